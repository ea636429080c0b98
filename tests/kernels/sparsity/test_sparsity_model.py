"""Unfolding of layer inputs, the walk over a model, masks through training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.sparsity import magnitude, masks, model, sparsegpt
from goldcrest.kernels.sparsity.hessian import (
    HessianAccumulator,
    layer_inputs,
    like_weight,
    weight_matrix,
)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, "same"]),
)
def test_unfolded_convolution_is_the_convolution(
    kernel: int, dilation: int, groups: int, stride: int, padding: int | str
) -> None:
    """Expected: torch's own convolution."""
    stride = 1 if padding == "same" else stride
    layer = nn.Conv1d(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    x = torch.randn(2, 4, 24)
    product = weight_matrix(layer) @ layer_inputs(layer, x)  # (G, R / G, B * T)
    expected = layer(x)
    got = product.flatten(0, 1).reshape(6, 2, -1).transpose(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(like_weight(layer, weight_matrix(layer)), layer.weight)


def test_transposed_linear_layer_of_transformers() -> None:
    layer = Conv1D(5, 3)
    x = torch.randn(2, 7, 3)
    product = weight_matrix(layer)[0] @ layer_inputs(layer, x)[0]
    torch.testing.assert_close(product.t().reshape(2, 7, 5) + layer.bias, layer(x))
    assert torch.equal(like_weight(layer, weight_matrix(layer)), layer.weight)


@pytest.mark.parametrize("dilation", [1, 3])
def test_padded_frames_do_not_enter_the_hessian(dilation: int) -> None:
    """Expected: the H of each utterance alone, summed."""
    layer = nn.Conv1d(4, 6, 3, padding=dilation, dilation=dilation)
    x = torch.randn(2, 4, 12)
    lengths = [12, 7]
    mask = torch.zeros(2, 12)
    alone = HessianAccumulator()
    for index, length in enumerate(lengths):
        mask[index, :length] = 1
        alone.add(layer_inputs(layer, x[index : index + 1, :, :length]))
    x[1, :, 7:] = 1e6
    together = HessianAccumulator()
    together.add(layer_inputs(layer, x, mask))
    assert together.tokens == alone.tokens == 19
    torch.testing.assert_close(together.hessian(), alone.hessian())


def test_hessian_of_linear_layer_by_hand() -> None:
    accumulator = HessianAccumulator()
    accumulator.add(layer_inputs(nn.Linear(2, 1), torch.tensor([[[1.0, 2.0], [9.0, 9.0]]]),
                                 torch.tensor([[1, 0]])))  # fmt: skip
    assert accumulator.hessian().tolist() == [[[2.0, 4.0], [4.0, 8.0]]]  # 2 x x^T
    with pytest.raises(ValueError, match="NaN"):
        accumulator.add(torch.full((1, 2, 1), float("nan")))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.grouped(torch.relu(self.first(x)))).mean(dim=2))


NAMES = ["first", "grouped", "last"]


def toy_and_calibration(seed: int = 0):
    torch.manual_seed(seed)
    toy = Toy()
    batches = [torch.randn(8, 4, 20) for _ in range(4)]

    def calibrate(network: nn.Module) -> Iterator[None]:
        for batch in batches:
            network(batch)
            yield None

    return toy, calibrate, batches


@pytest.mark.parametrize("names", [NAMES, [["first", "grouped"], "last"]])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "obs"])
def test_every_layer_gets_the_sparsity(method: str, names: list) -> None:
    toy, calibrate, _ = toy_and_calibration()
    toy.train()
    found = model.prune_model(
        toy, names, calibrate, method, 0.75, model.family.load(method).Settings()
    )
    for name in NAMES:
        assert found[name].shape == toy.get_submodule(name).weight.shape
        assert abs(int((~found[name]).sum()) - 0.75 * found[name].numel()) <= 1
    assert masks.realised_sparsity(toy, NAMES) == masks.sparsity(found)
    assert toy.training


def test_later_layers_see_the_pruned_earlier_ones() -> None:
    """Expected: pruning by hand, layer after layer, with H recollected in between."""
    toy, calibrate, batches = toy_and_calibration()
    by_hand, _, _ = toy_and_calibration()
    setting = sparsegpt.Settings()
    model.prune_model(toy, ["first", "last"], calibrate, "sparsegpt", 0.5, setting)
    for name in ("first", "last"):
        layer = by_hand.get_submodule(name)
        accumulator = HessianAccumulator()
        for batch in batches:
            inputs: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda _, arguments, inputs=inputs: inputs.append(arguments[0])
            )
            with torch.no_grad():
                by_hand(batch)
            handle.remove()
            accumulator.add(layer_inputs(layer, inputs[0]))
        pruned, _ = sparsegpt.prune(
            weight_matrix(layer)[0], accumulator.hessian()[0], sparsity=0.5, settings=setting
        )
        layer.weight.data.copy_(like_weight(layer, pruned[None]))
    for name in ("first", "last"):
        assert torch.equal(toy.get_submodule(name).weight, by_hand.get_submodule(name).weight)


def test_output_error_is_below_magnitudes() -> None:
    errors = {}
    for method in ("sparsegpt", "magnitude"):
        toy, calibrate, batches = toy_and_calibration(3)
        with torch.no_grad():
            before = toy(batches[0])
            setting = model.family.load(method).Settings()
            model.prune_model(toy, NAMES, calibrate, method, 0.6, setting)
            errors[method] = float((toy(batches[0]) - before).square().mean())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_global_magnitude_has_the_sparsity_over_all_layers() -> None:
    toy, calibrate, _ = toy_and_calibration()
    setting = magnitude.Settings(scope="global")
    found = model.prune_model(toy, NAMES, calibrate, "magnitude", 0.7, setting)
    total = sum(mask.numel() for mask in found.values())
    assert sum(int((~mask).sum()) for mask in found.values()) == round(0.7 * total)
    kept = torch.cat([toy.get_submodule(n).weight.detach()[found[n]].abs() for n in NAMES])
    fresh, _, _ = toy_and_calibration()
    gone = torch.cat([fresh.get_submodule(n).weight.detach()[~found[n]].abs() for n in NAMES])
    assert gone.max() <= kept.min()


def test_gradual_levels_are_the_studys() -> None:
    """50, 67, 75, 80, 83, 86, 88, 90 % as printed (rounded) in its section 4."""
    printed = [50, 67, 75, 80, 83, 86, 88, 90]
    assert [round(100 * level) for level in model.gradual_levels()] == printed
    with pytest.raises(ValueError, match="rise"):
        model.gradual_levels([4, 2])


def test_gradual_prunes_what_training_left() -> None:
    toy, calibrate, _ = toy_and_calibration()
    setting = sparsegpt.Settings(keep_zeros=True)
    before: masks.Masks | None = None
    for level, found in model.gradual(toy, NAMES, calibrate, "sparsegpt", [0.5, 0.75], setting):
        assert masks.sparsity(found) == pytest.approx(level, abs=0.01)
        if before is not None:
            assert all(not (found[n] & ~before[n]).any() for n in NAMES)
        with torch.no_grad():  # "fine-tuning"
            for name in NAMES:
                toy.get_submodule(name).weight.mul_(1.5)
        before = found


def test_layers_that_cannot_be_pruned_are_named() -> None:
    toy, calibrate, _ = toy_and_calibration()
    assert model.prunable(toy) == NAMES
    assert model.prunable(toy, skip=["last"]) == ["first", "grouped"]
    with pytest.raises(ValueError, match=r"no layer is called 'frist'.*did you mean 'first'\?"):
        model.prunable(toy, skip=["last", "frist"])
    with pytest.raises(ValueError, match="layers: first, grouped, last"):
        model.prunable(toy, skip=["xyzzy"])
    toy.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused'"):
        model.prune_model(toy, ["unused"], calibrate, "wanda", 0.5, None)
    with pytest.raises(ValueError, match="not a linear"):
        model.prune_model(nn.Sequential(nn.ReLU()), ["0"], calibrate, "wanda", 0.5, None)

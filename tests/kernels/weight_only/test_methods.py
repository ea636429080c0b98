"""What every method of the family owes, found by file; blocks, folding, sensitivity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels import weight_only
from goldcrest.kernels.weight_only import folding, sensitivity
from goldcrest.kernels.weight_only.block import Block, of_linears, of_module, sample_batches
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from goldcrest.tasks import methods as task_methods
from tests.kernels.weight_only.problems import SETS, layer, tiny_block, tiny_module, tokens

QUICK = {"autoround": {"iterations": 15}, "teq": {"steps": 15}, "awq": {"steps": 4}}
"""Settings that make a method quick enough for tests."""


def run(method: str, block: Block, grid: GridSettings, **changes) -> dict:
    rule = weight_only.load(method)
    settings = rule.Settings(**{**QUICK.get(method, {}), **changes})
    return rule.quantize(block, grid=grid, settings=settings, seed=3)


def test_methods_are_the_files_and_tasks_find_the_same() -> None:
    assert weight_only.methods() == ("autoround", "awq", "gptq", "rtn", "teq")
    assert tuple(task_methods.method_names("goldcrest.kernels.weight_only")) == (
        weight_only.methods()
    )
    with pytest.raises(ValueError, match="unknown weight-only method 'smoothquant'; there are"):
        weight_only.load("smoothquant")


@pytest.mark.parametrize("scheme", ["asym", "sym", "sym_full"])
@pytest.mark.parametrize("method", weight_only.methods())
def test_a_transformer_block(method: str, scheme: str) -> None:
    """Codes in range, the block as it was, the same seed the same bytes, near or below RTN."""
    module, hidden = tiny_module()
    block = of_module(module, lambda call, i: call(hidden[i]), len(hidden), sets=SETS)
    before = {name: weight.clone() for name, weight in block.weights.items()}
    grid = GridSettings(bits=3, group_size=16, scheme=scheme)
    result = run(method, block, grid)
    assert list(result) == list(block.weights)
    for name, quantized in result.items():
        rows, columns = block.weights[name].shape
        assert quantized.codes.dtype == quantized.zero_points.dtype == torch.uint8
        assert quantized.codes.shape == (rows, columns)
        assert quantized.scales.shape == quantized.zero_points.shape == (rows, columns // 16)
        assert int(quantized.codes.max()) <= 7
        assert torch.equal(block.weights[name], before[name])
    assert all(p.grad is None for p in module.parameters())
    again = run(method, block, grid)
    assert all(torch.equal(result[name].effective(), again[name].effective()) for name in result)
    plain = {name: round_to_grid(w, grid).effective() for name, w in block.weights.items()}
    error = block.total_error({name: item.effective() for name, item in result.items()})
    # GPTQ minimises each layer's error, not the block's: it alone is given some room.
    room = 1.1 if method == "gptq" else 1.0
    assert 0 < error <= room * block.total_error(plain)


@pytest.mark.parametrize("method", weight_only.methods())
def test_pruned_weights_stay_zero(method: str) -> None:
    block = layer(0)
    weight = block.weights["w"] * (tokens(9, 16) > 0)
    block = of_linears({"w": weight}, block.inputs["w"])
    keep = {"keep_zeros": True} if method in ("gptq", "autoround") else {}
    result = run(method, block, GridSettings(bits=3), **keep)
    assert (result["w"].effective()[weight == 0] == 0).all()


@pytest.mark.parametrize("method", weight_only.methods())
def test_odd_sizes_are_refused_or_ragged(method: str) -> None:
    block = layer(0, columns=40)
    with pytest.raises(ValueError, match="40 input channels do not divide into groups of 16"):
        run(method, block, GridSettings(group_size=16))
    result = run(method, block, GridSettings(group_size=16, ragged=True))
    assert result["w"].scales.shape == (16, 3)
    assert run(method, block, GridSettings(group_size=-1))["w"].scales.shape == (16, 1)


def test_block_of_a_module_sees_what_its_layers_see() -> None:
    """Inputs and H of each set, outputs with weights put in place; the module stays as it was."""
    module, hidden = tiny_module()
    block = tiny_block()
    with torch.no_grad():
        expected = module.norm1(hidden).flatten(0, 1)
        torch.testing.assert_close(block.inputs["q"], expected)
        torch.testing.assert_close(
            block.hessians["q"].float(), 2 * expected.t() @ expected, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(block.targets, module(hidden))
        changed = {"up": torch.randn(48, 32)}
        got = block.forward(changed, torch.tensor([2, 0]))
        assert block.total_error({}) == 0
        module.up.weight.copy_(changed["up"])
        torch.testing.assert_close(got, module(hidden[[2, 0]]))
    assert block.tokens == 120
    assert block.samples == 12
    few = of_module(module, lambda call, i: call(hidden[i]), 12, sets=SETS, keep=30)
    assert 24 <= len(few.inputs["down"]) <= 60
    mask = torch.arange(10)[None] < torch.tensor([[4]] * 12)
    masked = of_module(module, lambda call, i: call(hidden[i]), 12, sets=SETS, mask=mask)
    assert masked.tokens == 48


def test_block_of_a_transposed_linear_layer() -> None:
    """GPT-2's Conv1D keeps (inputs, outputs); its weight in the block is (outputs, inputs)."""
    layer_ = Conv1D(6, 4)
    x = torch.randn(3, 5, 4)
    block = of_module(layer_, lambda call, i: call(x[i]), 3, sets=(("",),))
    assert torch.equal(block.weights[""], layer_.weight.t())
    other = torch.randn(6, 4)
    got = block.forward({"": other}, torch.arange(3))
    torch.testing.assert_close(got, x @ other.t() + layer_.bias)


def test_batches_are_seeded_epochs() -> None:
    block = tiny_block()
    batches = sample_batches(block, 5, seed=1)
    first = torch.cat([next(batches) for _ in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    assert torch.equal(first[:5], next(sample_batches(block, 5, seed=1)))
    assert not torch.equal(first, torch.cat([next(batches) for _ in range(3)]))


def test_blocks_that_make_no_sense_are_refused() -> None:
    block = layer(0)
    with pytest.raises(ValueError, match="must name every weight once"):
        replace(block, sets=(("w",), ("w",)))
    with pytest.raises(ValueError, match="must name every weight once"):
        replace(block, sets=())
    with pytest.raises(ValueError, match="no hessians of width"):
        replace(block, hessians={})
    with pytest.raises(ValueError, match="do not fit 'w'"):
        of_linears({"w": torch.ones(2, 5)}, torch.ones(4, 6))
    with pytest.raises(ValueError, match="NaN"):
        of_linears({"w": torch.ones(2, 5)}, torch.full((4, 5), float("nan")))
    with pytest.raises(ValueError, match="no calibration"):
        of_linears({"w": torch.ones(2, 5)}, torch.ones(0, 5))
    module, hidden = tiny_module()
    for sets, count, message in (
        ((("norm1",),), 12, "not a linear layer"),
        (SETS, 0, "no calibration samples"),
    ):
        with pytest.raises(ValueError, match=message):
            of_module(module, lambda call, i: call(hidden[i]), count, sets=sets)
    with pytest.raises(ValueError, match="11 targets for 12"):
        of_module(module, lambda call, i: call(hidden[i]), 12, sets=SETS, targets=hidden[:11])
    module.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'extra' was not reached"):
        of_module(module, lambda call, i: call(hidden[i]), 12, sets=(*SETS, ("extra",)))


def test_folding_leaves_the_float_block_unchanged() -> None:
    """1 / t into norms, into v before o, into up before down (property 2)."""
    module, hidden = tiny_module()
    scales = {name: 0.5 + torch.rand(n) for name, n in (("q", 32), ("gate", 32), ("o", 32))}
    scales["down"] = 0.5 + torch.rand(48)
    with torch.no_grad():
        expected = module(hidden)
        for norm, name in ((module.norm1, "q"), (module.norm2, "gate")):
            norm.weight.copy_(folding.into_norm(norm.weight, None, scales[name])[0])
        for before, name in (("v", "o"), ("up", "down")):
            source = module.get_submodule(before)
            weight, bias = folding.into_linear(source.weight, source.bias, scales[name])
            source.weight.copy_(weight)
            if bias is not None:
                source.bias.copy_(bias)
        for names in SETS:
            for name in names:
                module.get_submodule(name).weight.mul_(scales[names[0]])
        torch.testing.assert_close(module(hidden), expected, rtol=1e-4, atol=1e-5)


def test_folding_into_a_quantized_layer_keeps_its_codes() -> None:
    """Rows of scales over t are rows of the decoded weight over t, to float32's last places."""
    weight, bias, t = torch.randn(8, 32), torch.randn(8), 0.5 + torch.rand(8)
    quantized = round_to_grid(weight, GridSettings())
    after, folded_bias = folding.into_quantized(quantized, bias, t)
    assert torch.equal(after.codes, quantized.codes)
    torch.testing.assert_close(after.decode(), quantized.decode() / t[:, None])
    torch.testing.assert_close(folded_bias, bias / t)
    scaled = round_to_grid(weight, GridSettings(), input_scales=torch.ones(32))
    assert folding.folded(scaled).input_scales is None
    with pytest.raises(ValueError, match="cannot be folded into 8 outputs"):
        folding.into_quantized(quantized, None, torch.ones(16))
    with pytest.raises(ValueError, match="above 0"):
        folding.into_norm(torch.ones(8), None, torch.zeros(8))


def test_sensitivity_finds_the_planted_outlier_layer() -> None:
    """Weights a hundred times the others spoil the grids of `up` (property 6).

    They read channels that the norm before always sets to 0, so nothing else changes.
    """
    module, hidden = tiny_module()
    with torch.no_grad():
        module.norm2.weight[::16] = 0
        module.up.weight[:, ::16] = 20.0
    block = of_module(module, lambda call, i: call(hidden[i]), len(hidden), sets=SETS)
    errors = sensitivity.output_errors(block, GridSettings(group_size=16))
    assert errors.keys() == block.weights.keys()
    assert sensitivity.rank(errors)[0] == "up"
    assert sensitivity.rank({"b": 1.0, "a": 1.0, "c": 2.0}) == ["c", "a", "b"]

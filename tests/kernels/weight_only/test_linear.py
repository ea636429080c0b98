"""The layer that computes with codes: both products, every stored form, no float weight."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.weight_only import matmul, packing
from goldcrest.kernels.weight_only.grid import GridSettings, QuantizedWeight, round_to_grid
from goldcrest.kernels.weight_only.linear import WeightOnlyLinear
from tests.kernels.weight_only.problems import act_order, rounded

FORMS = {
    "asym": lambda: rounded(0, 16, 96),
    "sym": lambda: rounded(1, 24, 64, scheme="sym"),
    "per row": lambda: rounded(2, 16, 96, group_size=-1),
    "act order": act_order,
    "ragged": lambda: rounded(3, 8, 72),
    "input scales": lambda: replace(rounded(4, 16, 64), input_scales=0.5 + torch.rand(64)),
    "8 bits": lambda: rounded(5, 16, 64, bits=8),
    "3 bits, odd sizes": lambda: rounded(6, 5, 13, bits=3, group_size=4),
    "float16 scales": lambda: rounded(7, 16, 64, scale_dtype="float16"),
}


def expected(weight: QuantizedWeight, x: Tensor) -> Tensor:
    return matmul.matmul_reference(x.flatten(0, -2), weight).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_decoded_product(form: str, tokens: int) -> None:
    """Exact to float32 by tiles; to bfloat16 (inputs, scales) by the operator."""
    weight = FORMS[form]()
    bias = torch.randn(weight.codes.shape[0])
    layer = WeightOnlyLinear.of(weight, bias)
    x = torch.randn(1, tokens, weight.codes.shape[1])
    got, wanted = layer(x), expected(weight, x) + bias
    assert got.dtype == torch.float32
    by_operator = layer._operator(x.device) is not None
    assert by_operator == (form not in ("ragged", "8 bits", "3 bits, odd sizes"))
    assert float((got - wanted).norm() / wanted.norm()) < (1e-2 if by_operator else 1e-6)
    exact = WeightOnlyLinear.of(weight, bias, compute="float32")
    torch.testing.assert_close(exact(x), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 9))
def test_tiles_equal_the_reference_for_any_size(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    """Also where a tile is one row, and the last tile is short."""
    weight = rounded(seed, rows, columns, bits=bits, group_size=16)
    layer = WeightOnlyLinear.of(weight, None)
    x = torch.randn(3, columns)
    tile, matmul.TILE = matmul.TILE, 3 * columns
    try:
        got = matmul.tiled(x, layer._packed())
    finally:
        matmul.TILE = tile
    torch.testing.assert_close(got, expected(weight, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_state_is_the_stored_layout_and_comes_back(form: str) -> None:
    """Buffers are `packing`'s tensors; an empty layer of the same form takes them by assignment."""
    weight = FORMS[form]()
    layer = WeightOnlyLinear.of(weight, torch.randn(weight.codes.shape[0]))
    state = layer.state_dict()
    stored = {f"x.{name}": tensor for name, tensor in state.items()}
    read = packing.unpack_state(stored)["x"]
    assert torch.equal(read.effective(), weight.effective())
    told = json.loads(json.dumps(layer.description()))
    empty = WeightOnlyLinear.empty(told)
    assert all(each.is_meta for each in empty.buffers())
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    empty.load_state_dict(state, assign=True)
    x = torch.randn(2, weight.codes.shape[1])
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(empty.quantized().codes, weight.codes)


@pytest.mark.parametrize("shape", [(4, 40), (160,)])
@pytest.mark.parametrize("form", ["asym", "sym", "per row", "act order", "input scales"])
def test_a_prompt_gives_the_same_alone_and_among_others(form: str, shape: tuple[int, ...]) -> None:
    """To the bit, also where the model lays the prompts of a batch end to end, as OPT does."""
    weight = FORMS[form]()
    layer = WeightOnlyLinear.of(weight, None)
    prompts = torch.randn(4, 40, weight.codes.shape[1])
    together = layer(prompts.reshape(*shape, -1)).reshape(4, 40, -1)
    for prompt, among_others in zip(prompts, together, strict=True):
        assert torch.equal(layer(prompt[None])[0], among_others)
        assert torch.equal(layer(prompt[None, -1:])[0, 0], among_others[-1])


def test_no_float_weight_is_kept_or_made() -> None:
    """4 bits of a 256 x 512 weight are 64 KiB; float32 would be 512 KiB."""
    weight = rounded(0, 256, 512, group_size=128)
    layer = WeightOnlyLinear.of(weight, None)
    layer(torch.randn(1, 512))
    held = sum(each.numel() * each.element_size() for each in layer.buffers())
    assert held < 0.16 * 256 * 512 * 4
    assert not any(each.is_floating_point() for each in layer.buffers() if each.numel() > 4096)
    assert layer.weight.is_meta
    assert layer.weight.shape == (256, 512)
    assert not dict(layer.named_parameters())


def test_stands_in_for_a_transposed_layer() -> None:
    """GPT-2's `Conv1D` keeps (inputs, outputs)."""
    float_layer = Conv1D(8, 64)
    nn.init.normal_(float_layer.bias)
    weight = round_to_grid(float_layer.weight.detach().t(), GridSettings(bits=8))
    layer = WeightOnlyLinear.of(weight, float_layer.bias)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), float_layer(x), rtol=0.02, atol=0.02)


def test_other_numbers_are_packed_anew() -> None:
    """The operator's form follows the buffers: copied into, assigned, converted, copied whole."""
    one, two = rounded(0, 16, 64), rounded(1, 16, 64)
    x = torch.randn(1, 64)
    layer = WeightOnlyLinear.of(one, None)
    before = layer(x)
    other = WeightOnlyLinear.of(two, None)
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(x), other(x))
        layer.load_state_dict(WeightOnlyLinear.of(one, None).state_dict(), assign=assign)
        assert torch.equal(layer(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)


def test_gradients_reach_the_inputs() -> None:
    """An adapter below a quantized layer can be trained."""
    weight = rounded(0, 16, 64)
    x = torch.randn(2, 64, requires_grad=True)
    WeightOnlyLinear.of(weight, None)(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.decode().sum(dim=0).expand(2, -1))


def test_half_precision_in_half_precision_out() -> None:
    weight = rounded(0, 16, 64)
    for tokens in (2, 100):
        x = torch.randn(tokens, 64)
        got = WeightOnlyLinear.of(weight, torch.randn(16), dtype=torch.bfloat16)(x.bfloat16())
        assert got.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_as_on_a_cpu() -> None:
    weight = rounded(0, 48, 256, group_size=64)
    layer = WeightOnlyLinear.of(weight, torch.randn(48), compute="float32")
    x = torch.randn(5, 256)
    wanted = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-4)

"""The INT8 linear layer and embedding against plain arithmetic, by every execution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.quantization.int8 import (
    Grid,
    dequantize,
    fake_quantize,
    grid_of_range,
    quantize_rows,
    quantize_weight,
    weight_scales,
)
from goldcrest.kernels.quantization.int8_linear import Int8Embedding, Int8Linear, best_execution

EXECUTIONS = list(dict.fromkeys(["onednn", best_execution(), "reference"]))


def layer_of(weight: Tensor, bias: Tensor | None, grid: Grid | None, execution: Any) -> Int8Linear:
    scales = weight_scales(weight)
    layer = Int8Linear.from_codes(quantize_weight(weight, scales), scales, bias, grid)
    layer.execution = execution
    return layer


@pytest.mark.parametrize("execution", EXECUTIONS)
@given(
    rows=st.integers(1, 9),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 130),
    zero_point=st.integers(0, 127),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_products_equal_integer_arithmetic(
    execution: Any, rows: int, outputs: int, inputs: int, zero_point: int, seed: int
) -> None:
    """Inputs on the grid, so that nothing is left to rounding."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 128, (rows, inputs), generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    sums = (codes - zero_point) @ weight.long().t()
    grid = Grid(scale=0.5, zero_point=zero_point)
    layer = Int8Linear.from_codes(weight, torch.full((outputs,), 0.25), None, grid)
    layer.execution = execution
    assert torch.equal(layer((codes - zero_point) * 0.5), sums.float() * 0.125)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_largest_sums_do_not_saturate(execution: Any) -> None:
    """Pairs of 255 x 127 would, on processors that add them in 16 bits; values are clamped too."""
    weight = torch.full((3, 2048), 127, dtype=torch.int8)
    weight[1] = -127
    layer = Int8Linear.from_codes(weight, torch.ones(3), None, Grid(scale=1.0, zero_point=0))
    layer.execution = execution
    for value in (127.0, 255.0, 1e30):
        expected = torch.tensor([[1.0, -1.0, 1.0]]) * 127 * 127 * 2048
        assert torch.equal(layer(torch.full((1, 2048), value)), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_static_equals_fake_quantization(execution: Any, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 48), torch.randn(2, 5, 48)
    bias = torch.randn(24) if with_bias else None
    grid = grid_of_range(float(x.min()) / 2, float(x.max()))  # some values lie outside
    layer = layer_of(weight, bias, grid, execution)
    expected = F.linear(fake_quantize(x, grid), layer.dequantized(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dynamic_gives_every_token_its_own_grid(execution: Any) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(24, 48), torch.randn(24)
    x = torch.randn(6, 48) * torch.logspace(-3, 3, 6)[:, None]
    layer = layer_of(weight, bias, None, execution)
    codes, scales, zero_points = quantize_rows(x)
    rounded = scales * (codes.float() - zero_points)
    expected = F.linear(rounded, layer.dequantized(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))
    assert float((layer(x) - F.linear(x, weight, bias)).norm() / layer(x).norm()) < 0.02


def test_executions_agree_on_real_inputs() -> None:
    """Rounding of ties is the only freedom that they have: a code here and there."""
    torch.manual_seed(2)
    weight, x = torch.randn(32, 64), torch.randn(50, 64)
    grid = grid_of_range(float(x.min()), float(x.max()))
    found = [layer_of(weight, None, grid, each)(x) for each in EXECUTIONS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1.01 * grid.scale * 3)


def test_zeros_stay_zeros_and_shapes_and_precision_are_kept() -> None:
    weight = torch.randn(8, 16)
    weight[weight.abs() < 0.8] = 0.0
    layer = layer_of(weight, None, grid_of_range(-1.0, 1.0), best_execution())
    assert torch.equal(layer.weight == 0, layer.dequantized() == 0)
    assert bool((layer.weight[weight == 0] == 0).all())
    assert layer(torch.randn(2, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.zeros(0, 16)).shape == (0, 8)
    assert layer(torch.randn(16)).shape == (8,)


@pytest.mark.parametrize("grid", [Grid(scale=0.1, zero_point=3), None])
def test_state_is_all_there_is(grid: Grid | None) -> None:
    torch.manual_seed(3)
    layer, x = (
        layer_of(torch.randn(8, 16), torch.randn(8), grid, best_execution()),
        torch.randn(4, 16),
    )
    expected = layer(x)
    activations: Any = "dynamic" if grid is None else "static"
    again = Int8Linear(16, 8, bias=True, activations=activations)
    assert not torch.equal(again(x), expected)  # packs zeros, which the load must replace
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_eight_bit_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 7 bits"):
        grid = Grid(scale=1.0, zero_point=0, bits=8)
        Int8Linear.from_codes(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2), None, grid)


def test_embedding_rows_are_within_half_a_step() -> None:
    torch.manual_seed(4)
    weight = torch.randn(20, 12) * torch.logspace(-2, 2, 20)[:, None]
    table = Int8Embedding.from_weight(weight)
    ids = torch.tensor([[0, 19, 7], [3, 3, 11]])
    assert table(ids).shape == (2, 3, 12)
    error = (table(ids) - nn.functional.embedding(ids, weight)).abs()
    assert bool((error <= table.scale[ids][..., None] * 0.5001).all())
    assert torch.equal(table.weight, quantize_weight(weight, weight_scales(weight)))


def test_grid_of_the_layer_is_that_of_int8() -> None:
    codes = torch.arange(128, dtype=torch.uint8)
    grid = grid_of_range(-3.0, 5.0)
    layer = Int8Linear.from_codes(torch.eye(128, dtype=torch.int8), torch.ones(128), None, grid)
    x = dequantize(codes, grid)
    torch.testing.assert_close(layer(x), x)

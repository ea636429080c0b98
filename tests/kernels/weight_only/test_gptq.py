"""GPTQ on groups against its column-by-column twin, rounding to nearest, and a case by hand."""

from __future__ import annotations

import pytest
import torch

from goldcrest.kernels.quantization.gptq import loss
from goldcrest.kernels.weight_only import gptq
from goldcrest.kernels.weight_only.block import of_linears
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from tests.kernels.weight_only.problems import layer, tokens


def test_two_columns_by_hand() -> None:
    """s = 7 / 7. 0.4 becomes 0; its error moves on by H_01 / H_11 = 1: 0.3 + 0.4 rounds to 1."""
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.4, 0.3, 7.0]])
    grid = GridSettings(scheme="sym", group_size=-1)
    got = gptq.quantize_weight(weight, hessian, grid, gptq.Settings(damping=0.0))
    assert got.decode().tolist() == [[0.0, 1.0, 7.0]]
    assert round_to_grid(weight, grid).decode().tolist() == [[0.0, 0.0, 7.0]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [1, 6, 8, 20, -1])
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_equals_the_reference_for_every_block_and_group(block: int, size: int, static) -> None:
    """Groups inside, across and beyond blocks see current weights (or the original ones)."""
    problem = layer(size, rows=5)
    weight, hessian = problem.weights["w"], problem.hessians["w"]
    grid = GridSettings(bits=3, group_size=size, ragged=True)
    setting = gptq.Settings(block=block, static_groups=static)
    got = gptq.quantize_weight(weight, hessian, grid, setting).decode()
    expected = gptq.quantize_weight_reference(weight, hessian, grid, setting)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["asym", "sym", "sym_full", "sym_gptq"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"clip": True}],
    ids=str,
)
def test_beats_rounding_in_the_h_metric(changes: dict, scheme: str) -> None:
    """Property 2, on the mean over layers."""
    ours = theirs = 0.0
    grid = GridSettings(group_size=8, scheme=scheme)
    for seed in range(3):
        problem = layer(seed)
        weight, hessian = problem.weights["w"], problem.hessians["w"]
        got = gptq.quantize_weight(weight, hessian, grid, gptq.Settings(**changes))
        ours += loss(weight, got.decode(), hessian)
        theirs += loss(weight, round_to_grid(weight, grid).decode(), hessian)
    assert ours < 0.85 * theirs


@pytest.mark.parametrize("changes", [{}, {"act_order": True, "static_groups": True}], ids=str)
def test_uncorrelated_inputs_give_rounding(changes: dict) -> None:
    """With diagonal H there is nothing to correct (property 2)."""
    weight = layer(0).weights["w"]
    diagonal = torch.diag(torch.rand(32).double() + 0.5)
    grid = GridSettings(group_size=8)
    got = gptq.quantize_weight(weight, diagonal, grid, gptq.Settings(**changes))
    expected = round_to_grid(weight, grid)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)


def test_act_order_stores_a_group_per_column_unless_groups_are_static() -> None:
    problem = layer(1, outliers=True)
    weight, hessian = problem.weights["w"], problem.hessians["w"]
    grid = GridSettings(group_size=8)
    got = gptq.quantize_weight(weight, hessian, grid, gptq.Settings(act_order=True))
    assert got.groups is not None
    assert got.groups.dtype == torch.int32
    by_importance = hessian.diagonal().argsort(descending=True, stable=True)
    assert got.groups[by_importance].tolist() == [j // 8 for j in range(32)]
    static = gptq.Settings(act_order=True, static_groups=True)
    assert gptq.quantize_weight(weight, hessian, grid, static).groups is None


def test_layers_that_share_an_input_come_out_as_if_alone() -> None:
    x = tokens(2)
    weights = {name: torch.randn(rows, 32) for name, rows in (("q", 8), ("k", 4), ("v", 12))}
    grid, setting = GridSettings(group_size=16), gptq.Settings(act_order=True)
    together = gptq.quantize(of_linears(weights, x), grid=grid, settings=setting)
    for name, weight in weights.items():
        alone = gptq.quantize(of_linears({name: weight}, x), grid=grid, settings=setting)
        assert torch.equal(together[name].codes, alone[name].codes)
        assert torch.equal(together[name].scales, alone[name].scales)


def test_kept_zeros_stay_zero_and_others_would_not() -> None:
    problem = layer(3)
    weight = problem.weights["w"] * (tokens(0, 16) > 0)
    zeros = weight == 0
    hessian, grid = problem.hessians["w"], GridSettings(bits=3)
    kept = gptq.quantize_weight(weight, hessian, grid, gptq.Settings(keep_zeros=True))
    free = gptq.quantize_weight(weight, hessian, grid, gptq.Settings())
    assert (kept.decode()[zeros] == 0).all()
    assert (free.decode()[zeros] != 0).any()


def test_dead_and_duplicate_inputs_are_survived() -> None:
    """Fewer tokens than inputs, one input never active, another the copy of a third (spec 8)."""
    x = tokens(4, count=6)
    x[:, 3], x[:, 5] = 0.0, x[:, 4]
    problem = of_linears({"w": layer(4).weights["w"]}, x)
    got = gptq.quantize(problem, grid=GridSettings(), settings=gptq.Settings(damping=0.0))
    assert torch.isfinite(got["w"].decode()).all()
    assert (got["w"].decode()[:, 3] == 0).all()


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="does not fit an H"):
        gptq.quantize_weight(torch.ones(2, 4), torch.eye(3), GridSettings(group_size=4),
                             gptq.Settings())  # fmt: skip
    with pytest.raises(ValueError, match="block"):
        gptq.Settings(block=0)
    with pytest.raises(ValueError, match="damping"):
        gptq.Settings(damping=-1)

"""Input scales, searched (AWQ) and trained (TEQ): equivalence, guarantees, gains on outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from goldcrest.kernels.weight_only import awq, teq
from goldcrest.kernels.weight_only.block import Block, of_linears
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from tests.kernels.weight_only.problems import layer, tiny_block, tokens

GRID = GridSettings(bits=3, group_size=16)


def error(block: Block, result: dict) -> float:
    return block.total_error({name: item.effective() for name, item in result.items()})


def rtn_error(block: Block, grid: GridSettings = GRID) -> float:
    return error(block, {name: round_to_grid(w, grid) for name, w in block.weights.items()})


def test_awq_scales_by_hand() -> None:
    """[1, 4, 16]^0.5 = [1, 2, 4], over sqrt(4 x 1); a dead channel counts as 1e-4."""
    activity = torch.tensor([1.0, 4.0, 16.0])
    assert awq.input_scales(activity, 0.5).tolist() == [0.5, 1.0, 2.0]
    assert awq.input_scales(activity, 0.0).tolist() == [1.0, 1.0, 1.0]
    dead = awq.input_scales(torch.tensor([0.0, 1.0]), 0.5)
    torch.testing.assert_close(dead, torch.tensor([1e-2, 1e2]))
    assert awq.input_scales(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("scheme", ["asym", "sym", "sym_full"])
@pytest.mark.parametrize("seed", range(4))
def test_awq_is_never_worse_than_rounding(seed: int, scheme: str) -> None:
    """alpha = 0 and the whole range are among what is tried (property 2)."""
    grid = replace(GRID, scheme=scheme)
    block = layer(seed, outliers=seed % 2 == 0)
    result = awq.quantize(block, grid=grid, settings=awq.Settings(steps=6))
    assert error(block, result) <= rtn_error(block, grid)


def test_awq_gains_where_channels_stand_out() -> None:
    """Every 8th channel 20 times the others: at least a third less error, clipping or not."""
    ours = unclipped = theirs = 0.0
    for seed in range(4):
        block = layer(seed, outliers=True)
        theirs += rtn_error(block)
        ours += error(block, awq.quantize(block, grid=GRID, settings=awq.Settings()))
        setting = awq.Settings(clip=False)
        unclipped += error(block, awq.quantize(block, grid=GRID, settings=setting))
    assert ours <= unclipped < theirs * 2 / 3


def test_awq_searches_the_best_alpha() -> None:
    """Expected: every alpha tried by hand, on one layer without clipping."""
    block = layer(7, outliers=True)
    x, weight = block.inputs["w"], block.weights["w"]
    errors = []
    for step in range(20):
        t = awq.input_scales(x.abs().mean(dim=0), step / 20)
        rounded = round_to_grid(weight * t, GRID).decode()
        errors.append(float(((x / t) @ rounded.t() - x @ weight.t()).square().mean()))
    result = awq.quantize(block, grid=GRID, settings=awq.Settings(clip=False))
    assert error(block, result) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("method", [awq, teq])
def test_scaling_is_an_equivalence(method) -> None:
    """(X / t) (W diag t)^T = X W^T for the scales found, which are above 0 (property 2)."""
    block = layer(1, outliers=True)
    setting = method.Settings(steps=12)
    t = method.quantize(block, grid=GRID, settings=setting)["w"].input_scales
    assert t is not None
    assert (t > 0).all()
    x, weight = block.inputs["w"], block.weights["w"]
    torch.testing.assert_close((x / t) @ (weight * t).t(), x @ weight.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", [awq, teq])
def test_a_set_shares_its_scales_and_may_have_none(method) -> None:
    block = replace(tiny_block(), unscaled=frozenset({"o", "up"}), unclipped=frozenset("qk"))
    quick = {"learning_rate": 3e-2} if method is teq else {}
    result = method.quantize(block, grid=GRID, settings=method.Settings(steps=10, **quick))
    assert result["q"].input_scales is not None
    assert torch.equal(result["q"].input_scales, result["v"].input_scales)
    for name in ("o", "up", "gate"):  # gate reads what up reads
        assert result[name].input_scales is None
    assert error(block, result) <= rtn_error(block)


def test_awq_clips_only_where_it_may() -> None:
    """Layers marked keep the scales of their whole range."""
    block = layer(2)
    grid = replace(GRID, bits=2)
    setting = awq.Settings(steps=1)  # alpha = 0: no scaling
    whole = round_to_grid(block.weights["w"], grid).scales
    clipped = awq.quantize(block, grid=grid, settings=setting)["w"].scales
    assert (clipped <= whole).all()
    assert (clipped < whole).any()
    kept = replace(block, unclipped=frozenset("w"))
    assert torch.equal(awq.quantize(kept, grid=grid, settings=setting)["w"].scales, whole)


def test_dead_channels_give_no_nan() -> None:
    x = tokens(0)
    x[:, 5] = 0
    block = of_linears({"w": layer(0).weights["w"]}, x)
    for method in (awq, teq):
        result = method.quantize(block, grid=GRID, settings=method.Settings(steps=5))
        assert torch.isfinite(result["w"].effective()).all()


@pytest.mark.parametrize("seed", range(3))
def test_teq_is_never_worse_than_rounding_and_gains_on_outliers(seed: int) -> None:
    block = layer(seed, outliers=True)
    setting = teq.Settings(steps=80, learning_rate=2e-2, batch=32)
    result = teq.quantize(block, grid=GRID, settings=setting)
    assert error(block, result) < 0.9 * rtn_error(block)
    none = teq.quantize(block, grid=GRID, settings=teq.Settings(steps=0))
    assert error(block, none) == rtn_error(block)


def test_teq_trains_on_a_models_own_loss() -> None:
    """Targets that are labels and cross-entropy: the loss falls below that of RTN."""
    x, weight = tokens(3, outliers=True) / 50, layer(3).weights["w"]
    labels = (x @ weight.t()).argmax(dim=1)
    block = replace(of_linears({"w": weight}, x), targets=labels, criterion=F.cross_entropy)
    setting = teq.Settings(steps=60, learning_rate=2e-2, batch=96)
    assert error(block, teq.quantize(block, grid=GRID, settings=setting)) < rtn_error(block)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="steps"):
        awq.Settings(steps=0)
    with pytest.raises(ValueError, match="learning_rate"):
        teq.Settings(learning_rate=0)
    with pytest.raises(ValueError, match="batch"):
        teq.Settings(batch=0)

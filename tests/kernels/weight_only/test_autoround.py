"""AutoRound: a step by hand, its reach, its guarantee."""

from __future__ import annotations

import pytest
import torch

from goldcrest.kernels.weight_only import autoround
from goldcrest.kernels.weight_only.block import Block, of_linears
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from tests.kernels.weight_only.problems import layer, tiny_block

GRID = GridSettings(bits=3, group_size=16)


def error(block: Block, result: dict) -> float:
    return block.total_error({name: item.effective() for name, item in result.items()})


def rtn_error(block: Block, grid: GridSettings = GRID) -> float:
    return error(block, {name: round_to_grid(w, grid) for name, w in block.weights.items()})


def train(block: Block, settings: autoround.Settings, grid: GridSettings = GRID):
    problems = {
        name: autoround._Problem(weight, grid, settings) for name, weight in block.weights.items()
    }
    start = {name: problem.start() for name, problem in problems.items()}
    return problems, autoround.train(block, problems, start, settings, seed=0)[1]


def test_one_step_by_hand() -> None:
    """s = 7 / 7; 0.4 becomes 0, too little, so V rises by lr = 0.3; an input of 0 has no slope."""
    block = of_linears({"w": torch.tensor([[0.4, 7.0]])}, torch.tensor([[1.0, 0.0]]))
    setting = autoround.Settings(iterations=1, learning_rate=0.3, tune_range=False)
    grid = GridSettings(scheme="sym", group_size=2)
    problems, last = train(block, setting, grid)
    assert last["w"].offset.flatten().tolist() == pytest.approx([0.3, 0.0])
    # 0.4 + 0.3 would round to 1, farther from 0.4 than 0 is: the start is kept.
    assert problems["w"].quantized(last["w"]).decode().tolist() == [[1.0, 7.0]]
    kept = autoround.quantize(block, grid=grid, settings=setting)
    assert kept["w"].decode().tolist() == [[0.0, 7.0]]


@pytest.mark.parametrize("scheme", ["asym", "sym", "sym_full"])
def test_never_worse_than_rounding_and_better_on_average(scheme: str) -> None:
    """Measured on all samples (property 2); wide correlated layers leave room for a fifth less."""
    grid = GridSettings(group_size=32, scheme=scheme)
    ours = theirs = 0.0
    for seed in range(3):
        block = layer(seed, columns=128)
        setting = autoround.Settings(iterations=60, batch=32)
        result = autoround.quantize(block, grid=grid, settings=setting, seed=seed)
        assert error(block, result) <= rtn_error(block, grid)
        ours += error(block, result)
        theirs += rtn_error(block, grid)
    assert ours < 0.8 * theirs


def test_no_iterations_are_rounding() -> None:
    block = layer(0)
    result = autoround.quantize(block, grid=GRID, settings=autoround.Settings(iterations=0))
    assert torch.equal(result["w"].codes, round_to_grid(block.weights["w"], GRID).codes)


def test_offsets_alone_move_to_neighbouring_codes() -> None:
    """V stays in [-1/2, 1/2] even where steps could carry it farther."""
    block = layer(1)
    setting = autoround.Settings(iterations=20, learning_rate=0.2, tune_range=False, batch=96)
    problems, last = train(block, setting)
    assert float(last["w"].offset.abs().max()) <= 0.5
    codes = problems["w"].quantized(last["w"]).codes.int()
    moved = (codes - round_to_grid(block.weights["w"], GRID).codes.int()).abs()
    assert int(moved.max()) == 1
    assert (last["w"].high == 1).all()


def test_ranges_stay_shares_and_codes_are_what_was_trained() -> None:
    """`rounded`, which the loss saw, is the codes decoded."""
    block = tiny_block()
    problems, last = train(block, autoround.Settings(iterations=8, learning_rate=0.3))
    for name, rounding in last.items():
        assert float(rounding.low.min()) >= 0
        assert float(rounding.high.max()) <= 1
        torch.testing.assert_close(
            problems[name].rounded(rounding), problems[name].quantized(rounding).decode(),
            rtol=1e-6, atol=1e-7,
        )  # fmt: skip
    assert any((rounding.high < 1).any() for rounding in last.values())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="iterations"):
        autoround.Settings(iterations=-1)
    with pytest.raises(ValueError, match="learning_rate"):
        autoround.Settings(learning_rate=0.0)

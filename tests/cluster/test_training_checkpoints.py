"""Checkpoints: whole or absent, verified, readable by any number of workers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldcrest.cluster import checkpoints
from goldcrest.cluster.errors import StoreError

VALUES = torch.arange(24, dtype=torch.float32)


def position(epoch: int) -> checkpoints.Position:
    return checkpoints.Position(
        epoch=epoch,
        step=4 * epoch,
        seed=1,
        examples=10,
        config={},
        shapes={"w": [4, 6]},
        aliases={"tied": "w"},
        history=[{"epoch": 0, "loss": 1.5}],
        totals={},
        workers=1,
    )


def write(scratch: Path, epoch: int, cuts: list[int]) -> Path:
    """A checkpoint of one parameter of 24 values, cut between workers at `cuts`."""
    folder = checkpoints.begin(scratch, epoch)
    edges = [0, *cuts, 24]
    for rank, (low, high) in enumerate(itertools.pairwise(edges)):
        pieces = {f"weight:{low}:w": VALUES[low:high] + epoch, f"step:{low}:w": torch.tensor([3.0])}
        checkpoints.write_tensors(folder, f"shard-{rank:05d}", pieces)
    checkpoints.write_tensors(folder, "whole", {"mean": torch.ones(2)})
    checkpoints.write_tensors(folder, "extra", {"seen": torch.tensor([7])})
    return checkpoints.commit(scratch, position(epoch))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(1, 23), max_size=4, unique=True).map(sorted),
    start=st.integers(0, 23),
    data=st.data(),
)
def test_any_piece_comes_back_from_any_cut(
    tmp_path: Path, cuts: list[int], start: int, data: st.DataObject
) -> None:
    numel = data.draw(st.integers(1, 24 - start))
    write(tmp_path, 1, cuts)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    piece = found.piece("weight", "w", start, numel)
    assert piece is not None and torch.equal(piece, VALUES[start : start + numel] + 1)


def test_everything_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 2, [10])
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.position == position(2)
    state = found.model_state()
    assert set(state) == {"w", "tied", "mean"}
    assert torch.equal(state["w"], VALUES.view(4, 6) + 2) and torch.equal(state["tied"], state["w"])
    assert found.extra()["seen"].item() == 7
    assert found.kinds() == ["step"]
    step = found.scalar("step", "w")
    assert step is not None and step.item() == 3
    assert found.piece("exp_avg", "w", 0, 3) is None
    assert found.weight("unknown") is None


def test_two_are_kept_and_unfinished_ones_are_not_seen(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write(tmp_path, epoch, [])
    checkpoints.begin(tmp_path, 4)  # a kill in the middle of writing
    names = sorted(p.name for p in checkpoints.folder_of(tmp_path).iterdir())
    assert names == [".epoch-00004", "epoch-00002", "epoch-00003"]
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.position.epoch == 3
    assert checkpoints.latest(tmp_path / "elsewhere") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "shard-00000.safetensors"), "checksum differs"),
        (lambda folder: (folder / "extra.safetensors").unlink(), "missing or has the wrong size"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("{", "utf-8"), "cannot be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]", "utf-8"), "cannot be read"),
    ],
)
def test_a_damaged_last_one_falls_back_to_the_one_before(
    tmp_path: Path, damage: object, said: str
) -> None:
    write(tmp_path, 1, [])
    damage(write(tmp_path, 2, []))  # type: ignore[operator]
    notes: list[str] = []
    found = checkpoints.latest(tmp_path, notes.append)
    assert found is not None and found.position.epoch == 1
    assert len(notes) == 1 and said in notes[0]
    write(tmp_path, 2, [])  # the run goes on and writes it again over the damaged one
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.position.epoch == 2


def test_a_missing_piece_or_another_format_is_an_error(tmp_path: Path) -> None:
    folder = checkpoints.begin(tmp_path, 1)
    checkpoints.write_tensors(folder, "shard-00000", {"weight:0:w": VALUES[:10]})
    target = checkpoints.commit(tmp_path, position(1))
    with pytest.raises(StoreError, match="holds only part of 'weight' of 'w'"):
        checkpoints.Checkpoint(target).weight("w")
    facts = json.loads((target / checkpoints.FACTS).read_text("utf-8"))
    (target / checkpoints.FACTS).write_text(json.dumps(facts | {"format": 99}), "utf-8")
    with pytest.raises(StoreError, match="another format"):
        checkpoints.Checkpoint(target)

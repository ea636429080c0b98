"""Frame files: what is written comes back, row by row, in another process too."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.tasks.data.frames import FrameReader, FrameWriter, JoinedFrames


@settings(deadline=None, max_examples=25)
@given(
    batches=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    dimensions=st.integers(1, 5),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_round_trip(tmp_path_factory, batches, dimensions, dtype) -> None:
    path = tmp_path_factory.mktemp("frames") / "f.arrow"
    rng = np.random.default_rng(0)
    expected: list[np.ndarray] = []
    with FrameWriter(path, dimensions, dtype) as writer:
        for lengths in batches:
            rows = [rng.standard_normal((n, dimensions)).astype(dtype) for n in lengths]
            ids = [str(len(expected) + n) for n in range(len(rows))]
            writer.write(ids, [0] * len(rows), [row.tobytes() for row in rows])
            expected += rows
    reader = FrameReader(path)
    assert len(reader) == len(expected)
    assert reader.lengths.tolist() == [len(row) for row in expected]
    for number, row in enumerate(expected):
        assert np.array_equal(reader[number], row.astype(np.float32))
    assert writer.frames == sum(len(row) for row in expected)


def test_copies_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "f.arrow"
    with FrameWriter(path, 2, "float32") as writer:
        frames = [np.full((1, 2), value, np.float32).tobytes() for value in range(3)]
        writer.write(["a", "a", "b"], [0, 1, 0], frames)
    reader = pickle.loads(pickle.dumps(FrameReader(path)))
    assert reader.rows() == {"a": 0, "b": 2}
    assert reader.rows(1) == {"a": 1}
    with pytest.raises(IndexError):
        reader[3]


def write(path: Path, *rows: np.ndarray) -> FrameReader:
    with FrameWriter(path, rows[0].shape[1], "float32") as writer:
        writer.write(
            [str(n) for n in range(len(rows))], [0] * len(rows), [r.tobytes() for r in rows]
        )
    return FrameReader(path)


def test_joined_files_are_read_as_one(tmp_path: Path) -> None:
    rows = [np.full((n + 1, 2), n, np.float32) for n in range(5)]
    joined = JoinedFrames([write(tmp_path / "a", *rows[:2]), write(tmp_path / "b", *rows[2:])])
    assert len(joined) == 5
    again = pickle.loads(pickle.dumps(joined))
    for number, row in enumerate(rows):
        assert np.array_equal(again[number], row)
    for beyond in (-1, 5):
        with pytest.raises(IndexError):
            joined[beyond]
    with pytest.raises(ValueError, match="not alike"):
        JoinedFrames([write(tmp_path / "c", rows[0]), write(tmp_path / "d", rows[0][:, :1])])

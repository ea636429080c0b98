"""Token files: rows come back as they went in, through a memory map, in any order."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.tasks.data.tokens import TokenReader, TokenRow, TokenWriter

ids = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(lambda each: np.array(each, np.int32))


def write(path: Path, rows: list[TokenRow]) -> TokenReader:
    with TokenWriter(path) as writer:
        for number, row in enumerate(rows):
            writer.write(row, example=number * 3, characters=number, size=2 * number)
    return TokenReader(path)


@given(st.lists(st.builds(TokenRow, ids, ids, ids), max_size=30))
@settings(max_examples=40, deadline=None)
def test_rows_come_back(rows: list[TokenRow]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reader = write(Path(folder) / "t.arrow", rows)
        assert len(reader) == len(rows)
        for number in reversed(range(len(rows))):
            found = reader[number]
            for name in ("prompt", "answer", "starts"):
                np.testing.assert_array_equal(getattr(found, name), getattr(rows[number], name))
                assert getattr(found, name).dtype == np.int32
        assert reader.lengths.tolist() == [len(row) for row in rows]
        assert reader.examples.tolist() == [number * 3 for number in range(len(rows))]
        assert (reader.bytes == 2 * reader.characters).all()


def test_many_batches_and_a_reader_in_another_process(tmp_path: Path) -> None:
    rows = [TokenRow(np.arange(n % 5), np.array([n])) for n in range(1300)]
    reader = pickle.loads(pickle.dumps(write(tmp_path / "t.arrow", rows)))
    assert [int(reader[n].answer[0]) for n in (0, 511, 512, 1024, 1299)] == [
        0,
        511,
        512,
        1024,
        1299,
    ]
    with pytest.raises(IndexError):
        reader[1300]
    with pytest.raises(ValueError, match="read-only"):
        reader[0].answer[0] = 1

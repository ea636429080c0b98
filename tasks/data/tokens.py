"""Token rows on disk: an Arrow file, written as a stream, read by memory map.

One row is what a model sees at once: the tokens of a prompt (no loss on them), the tokens of the
answer (the loss is theirs), and where documents start among the answer's tokens in a row that
several documents share. The file is uncompressed, so a reader maps it and touches only the rows
that it asks for: a corpus need not fit into memory, and every process on a node shares the pages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prompt", _TOKENS),
        ("answer", _TOKENS),
        ("starts", _TOKENS),
        ("example", pa.int64()),
        ("characters", pa.int32()),
        ("bytes", pa.int32()),
    ]
)
_BATCH_ROWS = 512


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """`prompt` (P,) and `answer` (A,) tokens, int32; `starts` (S,) int32 are the places in `answer`
    where documents start in a packed row (the first is 0), empty in a row of a prompt and answer.
    """

    prompt: np.ndarray
    answer: np.ndarray
    starts: np.ndarray = field(default_factory=_no_tokens)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def cut(row: TokenRow, length: int, family: str) -> TokenRow:
    """The first `length` tokens of a row; of an encoder-decoder's, on either side."""
    prompt = row.prompt[:length]
    answer = row.answer[: length if family == "seq2seq" else length - len(prompt)]
    return replace(row, prompt=prompt, answer=answer, starts=row.starts[row.starts < len(answer)])


def has_loss(row: TokenRow, family: str, special: Collection[int] = ()) -> bool:
    """Whether a loss is about any of the row's tokens, which may be cut.

    A masked model may be asked for every token that is not `special`; others for the answer, but
    the first token of a document and what a causal row begins with have nothing before them.
    """
    if family == "masked":
        return not np.isin([*row.prompt, *row.answer], list(special)).all()
    unpredicted = max(len(row.starts), int(family == "causal" and not len(row.prompt)))
    return len(row.answer) > unpredicted


class TokenWriter:
    """Writes token rows; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[tuple[TokenRow, int, int, int]] = []
        self.rows = 0

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def write(self, row: TokenRow, *, example: int, characters: int, size: int) -> None:
        """Append a row.

        `example` is the number of the (first) corpus row in it; `characters` and `size` (UTF-8
        bytes) tell how much text its loss is about.
        """
        self._waiting.append((row, example, characters, size))
        self.rows += 1
        if len(self._waiting) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows, examples, characters, sizes = zip(*self._waiting, strict=True)
        columns = [
            _lists([row.prompt for row in rows]),
            _lists([row.answer for row in rows]),
            _lists([row.starts for row in rows]),
            pa.array(examples, pa.int64()),
            pa.array(characters, pa.int32()),
            pa.array(sizes, pa.int32()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._waiting.clear()


def _lists(values: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(each) for each in values)], dtype=np.int32)
    flat = np.concatenate(values).astype(np.int32, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class TokenReader:
    """Rows of a token file by number. Cheap to send to another process: only the path travels.

    `lengths` (N,) int64 are tokens per row, prompt and answer; `predicted` (N,) int64 those that a
    loss is about (of a packed document, all but the first); `documents` (N,) int64 how many share a
    packed row, 0 of a prompt and answer; `examples` (N,) int64 numbers of the (first) corpus row in
    each; `characters` and `bytes` (N,) int64 how much text the loss of each
    row is about.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        self._columns = {
            name: [_Lists(chunk) for chunk in table.column(name).chunks]
            for name in ("prompt", "answer", "starts")
        }
        sizes = [len(chunk) for chunk in table.column("prompt").chunks]
        self._first_rows = np.cumsum([0, *sizes])
        answers = self._lengths("answer")
        self.lengths = self._lengths("prompt") + answers
        self.documents = self._lengths("starts")
        self.predicted = answers - self.documents
        self.examples = table.column("example").to_numpy()
        self.characters = table.column("characters").to_numpy().astype(np.int64)
        self.bytes = table.column("bytes").to_numpy().astype(np.int64)

    def __reduce__(self) -> tuple[type[TokenReader], tuple[Path]]:
        return (TokenReader, (self.path,))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenRow:
        """The row as views of the mapped file, which must not be written to."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        inside = row - int(self._first_rows[chunk])
        prompt, answer, starts = (self._columns[name][chunk][inside] for name in self._columns)
        return TokenRow(prompt, answer, starts)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document; a row that is not packed is one."""
        longest = int(self.lengths[self.documents == 0].max(initial=0))
        for answers, starts in zip(self._columns["answer"], self._columns["starts"], strict=True):
            inside = starts.values[starts.offsets[0] : starts.offsets[-1]]
            begins = inside + np.repeat(answers.offsets[:-1], np.diff(starts.offsets))
            borders = np.union1d(begins, answers.offsets)
            longest = max(longest, int(np.diff(borders).max(initial=0)))
        return longest

    def _lengths(self, name: str) -> np.ndarray:
        parts = [np.diff(each.offsets).astype(np.int64) for each in self._columns[name]]
        return np.concatenate([np.zeros(0, np.int64), *parts])


class _Lists:
    """A mapped array of lists of int32: offsets (N + 1,) and values."""

    def __init__(self, array: pa.ListArray) -> None:
        self.offsets = array.offsets.to_numpy()
        self.values = array.values.to_numpy()

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

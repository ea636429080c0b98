"""Feature frames on disk: an Arrow file, written as a stream, read by memory map.

One row per utterance: `id`, `copy` (0: clean, 1...: augmented), `frames` (T*F numbers as raw
little-endian bytes). The file is uncompressed, so a reader maps it and touches only the rows that
it asks for: a corpus need not fit into memory, and every process on a node shares the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema([("id", pa.string()), ("copy", pa.int32()), ("frames", pa.large_binary())])


class FrameWriter:
    """Writes rows of frames of `dimensions` features as `dtype` ("float16" or "float32")."""

    def __init__(self, path: Path, dimensions: int, dtype: str) -> None:
        facts = {"dimensions": str(dimensions), "dtype": dtype}
        self._schema = SCHEMA.with_metadata(facts)
        self._path, self._dtype, self._dimensions = path, np.dtype(dtype), dimensions
        self.frames = 0

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, ids: Sequence[str], copies: Sequence[int], frames: Sequence[bytes]) -> None:
        """Append rows; `frames` are the raw bytes of (T, F) arrays of the file's dtype."""
        batch = pa.record_batch(
            [list(ids), pa.array(copies, pa.int32()), pa.array(frames, pa.large_binary())],
            schema=self._schema,
        )
        self._writer.write_batch(batch)
        width = self._dimensions * self._dtype.itemsize
        self.frames += sum(len(row) // width for row in frames)


class FrameReader:
    """Rows of a frame file by number. Cheap to send to another process: only the path travels."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = pa.ipc.open_file(pa.memory_map(str(self.path)))
        facts = self._file.schema.metadata
        self.dimensions = int(facts[b"dimensions"])
        self._dtype = np.dtype(facts[b"dtype"].decode())
        table = self._file.read_all()
        self.ids: list[str] = table.column("id").to_pylist()
        self.copies = table.column("copy").to_numpy()
        self._chunks = table.column("frames").chunks
        sizes = np.array([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        lengths = [chunk_lengths(chunk) for chunk in self._chunks]
        width = self.dimensions * self._dtype.itemsize
        self.lengths = (np.concatenate(lengths) if lengths else np.zeros(0, np.int64)) // width

    def __reduce__(self) -> tuple[type[FrameReader], tuple[Path]]:
        return (FrameReader, (self.path,))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> np.ndarray:
        """(T, F) float32, a copy."""
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        data = self._chunks[chunk][row - int(self._starts[chunk])].as_buffer()
        frames = np.frombuffer(data, dtype=self._dtype).reshape(-1, self.dimensions)
        return frames.astype(np.float32)

    def rows(self, copy: int = 0) -> dict[str, int]:
        """Row number of every utterance's given copy, by id, in the order of the file."""
        return {self.ids[int(row)]: int(row) for row in np.flatnonzero(self.copies == copy)}


class JoinedFrames:
    """Several frame files as one: the rows of the second follow those of the first, and so on."""

    def __init__(self, readers: Sequence[FrameReader]) -> None:
        """Raises ValueError if the readers differ in their number of features."""
        if len({reader.dimensions for reader in readers}) != 1:
            raise ValueError(f"{[reader.dimensions for reader in readers]} features: not alike")
        self.readers = list(readers)
        self.dimensions = self.readers[0].dimensions
        self.starts = np.cumsum([0, *(len(reader) for reader in self.readers)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        """(T, F) float32, a copy."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.readers[number][row - int(self.starts[number])]


def chunk_lengths(chunk: pa.LargeBinaryArray) -> np.ndarray:
    """Bytes of every value of a binary array, (N,) int64, from its offsets alone."""
    offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)
    window = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
    return np.diff(window)

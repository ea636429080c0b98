"""Parquet shards cut into pieces, so that a pool of workers can share a few large ones.

Borders lie on multiples of the batch, so that whoever works on the pieces sees the same batches,
however many there are. A piece is read batch by batch: memory is bounded by a row group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [first, first + rows) of a Parquet shard, cut into batches of at most `batch_rows`."""

    shard: Path
    first: int
    rows: int
    batch_rows: int

    def batches(self) -> Iterator[pa.Table]:
        """The piece's batches in order, decoded one after the other."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, stop = self.first, self.first + self.rows
        with pq.ParquetFile(self.shard) as file:
            groups, offset = _row_groups(file.metadata, start, stop)
            pending: list[pa.RecordBatch] = []
            count = 0
            # A decoded batch may be shorter than asked for where row groups meet: join them again.
            for batch in file.iter_batches(self.batch_rows, row_groups=groups):
                skipped = min(max(0, start - offset), batch.num_rows)
                inside = batch.slice(skipped, max(0, stop - max(start, offset)))
                offset += batch.num_rows
                while inside.num_rows:
                    taken = inside.slice(0, self.batch_rows - count)
                    inside = inside.slice(taken.num_rows)
                    pending.append(taken)
                    count += taken.num_rows
                    if count == self.batch_rows:
                        yield pa.Table.from_batches(pending)
                        pending, count = [], 0
            if pending:
                yield pa.Table.from_batches(pending)


def _row_groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows [start, stop), and the row where the first of them begins."""
    groups: list[int] = []
    offset = row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < stop and row + rows > start:
            if not groups:
                offset = row
            groups.append(group)
        row += rows
    return groups, offset


def cut(shards: Sequence[Path], workers: int, batch_rows: int) -> list[Piece]:
    """The shards as pieces for `workers`: a shard is divided only where shards are too few.

    Borders lie on multiples of `batch_rows`, so the batches are the same for any `workers`.
    """
    import pyarrow.parquet as pq

    if batch_rows < 1 or workers < 1:
        raise ValueError("stream needs batch_rows and workers of at least 1")
    parts = math.ceil(workers / len(shards)) if shards else 1
    pieces = []
    for shard in shards:
        total = pq.read_metadata(shard).num_rows
        step = max(1, math.ceil(math.ceil(total / batch_rows) / parts)) * batch_rows
        for first in range(0, total, step):
            rows = min(step, total - first)
            pieces.append(Piece(shard=Path(shard), first=first, rows=rows, batch_rows=batch_rows))
    return pieces

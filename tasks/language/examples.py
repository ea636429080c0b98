"""Examples of a text corpus: a prompt, its answer, and for evaluation every answer that is right.

What every later step reads. Plain text is an example without a prompt, whose answer is the text;
of a speech corpus the answer is what was said, and the audio lies beside it (prepare_speech.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from goldcrest.cluster.api import Artifact

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("references", pa.list_(pa.string())),
    ]
)
_ROWS = 256  # decoded at a time


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a corpus.

    Training splits have a row for every answer, and no references. Evaluation splits have a row for
    every prompt; `answer` is the first of its `references`. Plain text has neither, a
    transcript no prompt.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...] = ()


def count_examples(corpus: Artifact, split: Split) -> int:
    """Number of rows of a split."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(shard).num_rows for shard in corpus.shards(split))


def read_examples(corpus: Artifact, split: Split) -> Iterator[Example]:
    """The rows of a split in order, read as they are taken."""
    import pyarrow.parquet as pq

    for shard in corpus.shards(split):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(_ROWS, columns=SCHEMA.names):
                for row in batch.to_pylist():
                    references = tuple(row["references"])
                    yield Example(row["id"], row["prompt"], row["answer"], references)

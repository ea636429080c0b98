"""Embed: all utterances through a speaker bundle, for another round of clustering.

Artifact: vectors (id, copy, split, vector), as the i-vector step writes them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, DoesNotChangeResult, Output, task
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.speaker.ivector import list_column


class EmbedConfig(Config):
    """How the work is cut."""

    shard_utterances: Annotated[int, DoesNotChangeResult] = Field(
        2_000, ge=1, description="utterances per piece of work"
    )


@task(cpus=0, seeded=False, timeout="12h")
def embed(cfg: EmbedConfig, model: Artifact, features: Artifact, out: Output) -> None:
    """Length-normalised embeddings of every row of the features."""
    for member in ("bundle.json", "model.safetensors"):
        model.file(member)  # verified here, read by the workers
    reader = FrameReader(features.file("fbank.arrow"))
    rows = np.arange(len(reader))
    size = cfg.shard_utterances
    ranges = [rows[start : start + size] for start in range(0, len(rows), size)]
    work = functools.partial(embed_rows, folder=model.path, reader=reader)
    found = []
    for number, part in enumerate(out.runtime.map(work, ranges, note="embed")):
        found.append(part)
        out.progress((number + 1) / len(ranges), "embeddings")
    vectors = np.concatenate(found)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = features.table("index")
    out.table("vectors", index.append_column("vector", list_column(vectors)))
    out.metrics(embed={"dimensions": vectors.shape[1], "utterances": len(rows)})


def embed_rows(rows: np.ndarray, *, folder: Path, reader: FrameReader) -> np.ndarray:
    """(len(rows), E) float32 by the bundle in `folder`."""
    from goldcrest.tasks.speaker.bundle import load_bundle

    model: Any = load_bundle(folder)
    return np.stack([model.embed(reader[int(row)]) for row in rows])

"""Utterance vectors of an artifact (i-vectors or embeddings) as arrays, matched by id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from goldcrest.cluster.api import Artifact


@dataclass(frozen=True)
class Vectors:
    """ids (N,) of a split's clean utterances, matrix (N, D), augmented (J, N, D) copies."""

    ids: list[str]
    matrix: np.ndarray
    augmented: np.ndarray


def read_vectors(artifact: Artifact, split: str | None = None) -> Vectors:
    """The vectors of table `vectors`, of one split or of all.

    Copies are paired with their clean utterance by id, never by order: filters may drop rows.
    """
    table = artifact.table("vectors", ["id", "copy", "split"])
    ids = np.array(table.column("id").to_pylist())
    copies = table.column("copy").to_numpy()
    chosen = np.ones(len(ids), dtype=bool)
    if split is not None:
        chosen = np.array(table.column("split").to_pylist()) == split
    matrix = artifact.matrix("vectors", "vector")
    rows = {
        int(copy): {str(ids[row]): row for row in np.flatnonzero(chosen & (copies == copy))}
        for copy in np.unique(copies)
    }
    clean = rows.get(0, {})
    names = [name for name in clean if all(name in part for part in rows.values() if part)]
    augmented = [
        matrix[[part[name] for name in names]] for copy, part in rows.items() if copy and part
    ]
    stacked = np.stack(augmented) if augmented else np.zeros((0, len(names), matrix.shape[1]))
    return Vectors(names, matrix[[clean[name] for name in names]], stacked.astype(np.float32))


def facts_by_id(corpus: Artifact, column: str) -> dict[str, str | None]:
    """`{utterance id: value}` of one column of the prepared corpus's facts."""
    table = corpus.table("facts", ["id", column])
    return dict(zip(table.column("id").to_pylist(), table.column(column).to_pylist(), strict=True))

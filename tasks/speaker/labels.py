"""What steps that make pseudo-labels share: their table, and how it compares with the speakers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from goldcrest.cluster.api import Artifact, Output
from goldcrest.tasks.speaker.vectors import Vectors, facts_by_id


def compact(labels: np.ndarray) -> np.ndarray:
    """Labels without gaps: (N,) int -> (N,) int32 in 0..K-1, order of the values kept."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def write_labels(out: Output, ids: list[str], labels: np.ndarray) -> None:
    """The table `labels`: id, label (N,) int32."""
    out.table("labels", {"id": ids, "label": pa.array(labels, pa.int32())})


def speaker_truth(ids: list[str], corpus: Artifact | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Which utterances have a known speaker, (N,) bool, and the speakers' numbers of those."""
    if corpus is None:
        return None
    speaker_of = facts_by_id(corpus, "speaker")
    known = np.array([speaker_of.get(name) is not None for name in ids])
    if not known.any():
        return None
    names = [str(speaker_of[name]) for name, k in zip(ids, known, strict=True) if k]
    return known, np.unique(names, return_inverse=True)[1]


def clustering_facts(
    found: Vectors, labels: np.ndarray, clusters: int, corpus: Artifact | None
) -> dict[str, Any]:
    """Metrics of labels (N,) without gaps; with the speakers' own where the corpus knows them."""
    from goldcrest.kernels.metrics.clustering import clustering_metrics, supervised_metrics

    sizes = np.bincount(labels)
    facts: dict[str, Any] = {
        "clusters_asked": clusters,
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        **clustering_metrics(labels, x=found.matrix),
    }
    truth = speaker_truth(found.ids, corpus)
    if truth is not None:
        known, speakers = truth
        facts |= supervised_metrics(labels[known], speakers)
        facts["speakers"] = int(speakers.max()) + 1
    return facts

"""Adaptive s-norm: scores relative to each side's nearest impostors in a cohort.

Sources: S. Cumani et al., "Comparison of Speaker Recognition Approaches for Real Applications",
Interspeech 2011, section 3 (adaptive s-norm); P. Matejka et al., "Analysis of Score Normalization
in Multilingual Speaker Recognition", Interspeech 2017, equation (6), adaptive s-norm 1.

    s' = 1/2 [ (s - mean(e)) / std(e) + (s - mean(t)) / std(t) ]

where mean(e), std(e) are over the `top` highest scores of the enrolment utterance against the
cohort, and mean(t), std(t) the same for the test utterance. A score then means the same for every
speaker, channel and duration, so one threshold serves trials of unlike corpora.

N utterances   M cohort members   E dimensions   K trials
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from goldcrest.kernels.speaker.scoring import cosine_scores, length_normalise

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the adaptive s-norm."""

    top: int = 200  # nearest cohort members per utterance; the whole cohort if it is smaller
    block: int = 1024  # utterances scored against the cohort at once; bounds memory

    def __post_init__(self) -> None:
        if self.top < 2 or self.block < 1:
            raise ValueError("top must be at least 2 and block at least 1")


def cohort_statistics(
    embeddings: ArrayLike, cohort: ArrayLike, settings: Settings
) -> tuple[FloatArray, FloatArray]:
    """Mean and deviation (N,) of each utterance's `top` highest cosines with the cohort.

    Args:
        embeddings: (N, E).
        cohort: (M, E) of other speakers, such as the training set or its speakers' means.

    Raises:
        ValueError: a cohort of fewer than two, or of another dimension.
    """
    unit, rivals = length_normalise(embeddings), length_normalise(cohort)
    if rivals.ndim != 2 or len(rivals) < 2 or rivals.shape[1] != unit.shape[1]:
        raise ValueError(
            f"the cohort must be at least 2 embeddings of {unit.shape[1]} dimensions, "
            f"not {rivals.shape}"
        )
    top = min(settings.top, len(rivals))
    means, deviations = np.empty(len(unit)), np.empty(len(unit))
    for start in range(0, len(unit), settings.block):
        rows = slice(start, start + settings.block)
        nearest = np.partition(unit[rows] @ rivals.T, -top, axis=1)[:, -top:]
        means[rows], deviations[rows] = nearest.mean(axis=1), nearest.std(axis=1)
    return means, np.maximum(deviations, 1e-6)


def asnorm_scores(
    embeddings: ArrayLike,
    cohort: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    settings: Settings | None = None,
) -> FloatArray:
    """Normalised cosine scores (K,) of trials over embeddings (N, E); see the file's formula."""
    means, deviations = cohort_statistics(embeddings, cohort, settings or Settings())
    scores = cosine_scores(embeddings, first, second)
    sides = (np.asarray(first), np.asarray(second))
    return np.mean([(scores - means[side]) / deviations[side] for side in sides], axis=0)

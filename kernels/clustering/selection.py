"""Choosing without labels: the number of clusters C, and settings such as CIMC's mu.

Both ask the same question: which choice gives a partition that can be *found again*? Agreement is
the adjusted mutual information (AMI), which is corrected for chance, so that many or few clusters
are not favoured by themselves.

Number of clusters (Ben-Hur, Elisseeff & Guyon 2002; Lange et al. 2004): cluster random subsamples
of the vectors, cut each dendrogram at C, compare the labels of the vectors that two subsamples
share; take the C with the highest mean AMI. Coarse splits (channel, sex) are always stable, so the
search starts at sqrt(N/2), the usual rule of thumb (Mardia, Kent & Bibby 1979, p. 365), and ends at
four vectors per cluster on average.

Settings: of several candidates take the one whose partitions agree best with one another and with
a reference that errs differently (AHC for CIMC). Where mu is too low CIMC merges speakers, where it
is too high it splits big ones to make sizes equal; either moves it away from the dendrogram.

N vectors, D dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from goldcrest.kernels.clustering import ahc
from goldcrest.kernels.clustering.normalisation import apply_norm, fit_norm
from goldcrest.kernels.metrics.clustering import adjusted_mutual_information

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class StabilitySettings:
    """How the number of clusters is searched."""

    resamples: int = 4  # subsamples; each costs one dendrogram, each pair one comparison
    share: float = 0.8  # part of the vectors in a subsample
    candidates: int = 24  # numbers of clusters tried, evenly spaced on a logarithmic scale
    least: int | None = None  # smallest number tried; None: sqrt(N/2)
    most: int | None = None  # largest number tried; None: N/4

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.resamples < 2 or self.candidates < 1:
            raise ValueError("stability needs at least 2 resamples and 1 candidate")
        if not 0.5 < self.share < 1:
            raise ValueError(f"share must be between 0.5 and 1, got {self.share}")
        if self.least is not None and self.least < 1:
            raise ValueError(f"least must be at least 1, got {self.least}")
        if self.least is not None and self.most is not None and self.most < self.least:
            raise ValueError(f"most = {self.most} is below least = {self.least}")

    def numbers(self, rows: int) -> list[int]:
        """The numbers of clusters tried for N = `rows` vectors, rising."""
        ceiling = max(int(self.share * rows), 1)  # a subsample cannot be cut finer
        least = round((rows / 2) ** 0.5) if self.least is None else self.least
        most = rows // 4 if self.most is None else self.most
        least = min(max(least, 1), ceiling)
        most = min(max(most, least), ceiling)
        return sorted({round(c) for c in np.geomspace(least, most, self.candidates)})


def number_of_clusters(
    x: Tensor,
    settings: ahc.Settings,
    *,
    seed: int,
    search: StabilitySettings | None = None,
) -> tuple[int, dict[int, float]]:
    """The C whose AHC partition of x (N, D) is most stable, and the stability of every C tried.

    Ties go to the larger C: a speaker in two clusters costs a pseudo-label trainer less than two
    speakers in one.
    """
    search = search or StabilitySettings()
    x = apply_norm(fit_norm(x, settings.norm), x)
    rng = np.random.default_rng(seed)
    kept = int(search.share * len(x))
    samples = [np.sort(rng.permutation(len(x))[:kept]) for _ in range(search.resamples)]
    merges = [ahc.dendrogram(x[torch.from_numpy(rows)], settings) for rows in samples]
    scores: dict[int, float] = {}
    for clusters in search.numbers(len(x)):
        found = []
        for rows, tree in zip(samples, merges, strict=True):
            labels = np.full(len(x), -1)
            labels[rows] = ahc.cut(tree, clusters)
            found.append(labels)
        scores[clusters] = float(np.mean([_agreement(a, b) for a, b in combinations(found, 2)]))
    return max(scores, key=lambda clusters: (scores[clusters], clusters)), scores


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    both = (a >= 0) & (b >= 0)
    return adjusted_mutual_information(a[both], b[both])


def by_agreement(
    partitions: Mapping[Value, Sequence[np.ndarray]], reference: np.ndarray
) -> tuple[Value, dict[Value, float]]:
    """The candidate whose partitions agree best, and the mean AMI of every candidate.

    `partitions` holds for each candidate one or more labellings (N,), say of different seeds;
    `reference` (N,) is another method's labelling. A candidate's score is the mean AMI over all
    pairs among its own labellings and the reference. Ties go to the first. ValueError if empty.
    """
    if not partitions or not all(len(labellings) for labellings in partitions.values()):
        raise ValueError("by_agreement needs at least one candidate, each with a labelling")
    scores = {
        value: float(
            np.mean(
                [
                    adjusted_mutual_information(a, b)
                    for a, b in combinations([reference, *labellings], 2)
                ]
            )
        )
        for value, labellings in partitions.items()
    }
    return max(scores, key=lambda value: scores[value]), scores

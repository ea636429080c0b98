"""k-means: k-means++ seeding, Lloyd iterations, mini-batches for large N.

Sources: Arthur & Vassilvitskii 2007 (k-means++: next centre with probability proportional to the
squared distance D(x)^2 to the nearest centre so far); Lloyd 1982; Sculley 2010, algorithm 1
(mini-batches with a learning rate of 1/count per centre). An empty cluster takes over the vector
farthest from its centre, so that exactly C clusters come back.

Lloyd's sums are plain `Sums`: shards of the data accumulate apart and merge, which is how the
iteration runs over many machines.

N utterances, D dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from goldcrest.kernels.clustering.normalisation import Norm, apply_norm, check_norm, fit_norm
from goldcrest.kernels.clustering.result import Clustering, Train, check_input


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of k-means."""

    norm: Norm = "l2"  # normalisation of the vectors: l2 (rows), standard (columns), none
    starts: int = 1  # seedings tried; the one with the least inertia is kept
    iterations: int = 300  # most Lloyd iterations, or mini-batches where batch_size is set
    tolerance: float = 1e-4  # stop when the inertia falls by less than this share
    batch_size: int | None = None  # vectors per mini-batch; None: all vectors (Lloyd)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_norm(self.norm)
        if self.starts < 1 or self.iterations < 1:
            raise ValueError("k-means: starts and iterations must be at least 1")
        if self.tolerance < 0:
            raise ValueError(f"k-means: tolerance must be at least 0, got {self.tolerance}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"k-means: batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Sums:
    """What one pass over vectors leaves: per cluster sums (C, D) and counts (C,), the inertia (sum
    of squared distances), and the C vectors farthest from their centres with those distances."""

    sums: Tensor
    counts: Tensor
    inertia: float
    far: Tensor
    far_distances: Tensor


def nearest_centre(x: Tensor, centres: Tensor, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Cluster (N,) int64 and squared distance (N,) of the nearest of centres (C, D) to x (N, D)."""
    squares = centres.square().sum(dim=1)
    labels, distances = [], []
    for block in x.split(chunk):
        least = (squares - 2 * block @ centres.T).min(dim=1)
        labels.append(least.indices)
        distances.append((least.values + block.square().sum(dim=1)).clamp_min(0))
    return torch.cat(labels), torch.cat(distances)


def seed_centres(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: `clusters` rows of x (N, D), far from each other at random, (C, D)."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [first]
    nearest = (x - x[first]).square().sum(dim=1)
    for _ in range(clusters - 1):
        # All remaining distances are 0 where there are fewer distinct vectors than clusters.
        weights = nearest if bool((nearest > 0).any()) else torch.ones_like(nearest)
        cumulative = weights.double().cumsum(dim=0)
        target = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, target, right=True)), len(x) - 1))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(dim=1))
    return x[chosen].clone()


def accumulate(x: Tensor, centres: Tensor) -> Sums:
    """One pass of Lloyd over a shard x (n, D), n >= 1; float64 sums."""
    labels, distances = nearest_centre(x, centres)
    wide = x.double()
    sums = torch.zeros(centres.shape, dtype=torch.float64).index_add_(0, labels, wide)
    counts = labels.bincount(minlength=len(centres))
    far = distances.topk(min(len(centres), len(x)))
    return Sums(sums, counts, float(distances.double().sum()), x[far.indices], far.values)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of two shards together: the same as one pass over both."""
    distances, vectors = torch.cat([a.far_distances, b.far_distances]), torch.cat([a.far, b.far])
    far = distances.topk(min(len(a.counts), len(distances)))
    return Sums(
        a.sums + b.sums,
        a.counts + b.counts,
        a.inertia + b.inertia,
        vectors[far.indices],
        far.values,
    )


def update(sums: Sums) -> Tensor:
    """New centres (C, D) float32: means, and for empty clusters the farthest vectors."""
    centres = (sums.sums / sums.counts.clamp_min(1)[:, None]).float()
    empty = (sums.counts == 0).nonzero()[:, 0]
    centres[empty] = sums.far[: len(empty)]
    return centres


def lloyd(x: Tensor, centres: Tensor, settings: Settings) -> tuple[Tensor, list[float]]:
    """Lloyd iterations from centres (C, D); the last centres and the inertia of every iteration."""
    history: list[float] = []
    for _ in range(settings.iterations):
        sums = accumulate(x, centres)
        history.append(sums.inertia)
        settled = len(history) > 1 and history[-2] - history[-1] <= settings.tolerance * history[-2]
        if settled and bool((sums.counts > 0).all()):
            break
        centres = update(sums)
    return centres, history


def lloyd_step_reference(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The plain twin of `update(accumulate(x, centres))` where no cluster is empty: two loops."""
    members: list[list[np.ndarray]] = [[] for _ in centres]
    for vector in x:
        members[int(np.argmin([((vector - centre) ** 2).sum() for centre in centres]))].append(
            vector
        )
    return np.stack([np.mean(rows, axis=0) for rows in members])


def mini_batches(
    x: Tensor, centres: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, list[float]]:
    """Sculley's updates from centres (C, D); the last centres and the inertia of every batch."""
    assert settings.batch_size is not None
    centres, seen = centres.double(), torch.zeros(len(centres), dtype=torch.float64)
    history: list[float] = []
    for _ in range(settings.iterations):
        rows = torch.randint(len(x), (min(settings.batch_size, len(x)),), generator=generator)
        sums = accumulate(x[rows], centres.float())
        seen += sums.counts
        step = (sums.sums - sums.counts[:, None] * centres) / seen.clamp_min(1)[:, None]
        centres = centres + step
        history.append(sums.inertia)
    return centres.float(), history


def fit(
    x: Tensor,
    clusters: int,
    settings: Settings,
    *,
    seed: int,
    train: Train | None = None,
    augmented: Tensor | None = None,
    truth: np.ndarray | None = None,
) -> Clustering:
    """Cluster x (N, D) float32 into exactly `clusters` clusters (N distinct vectors permitting).

    `train`, `augmented` and `truth` belong to the common face and are not used. The history has one
    row per iteration of the best start: `{"iteration", "inertia"}`. Raises ValueError on bad input.
    """
    check_input(x, clusters)
    model = fit_norm(x, settings.norm)
    x = apply_norm(model, x)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, list[float]] | None = None
    for _ in range(settings.starts):
        centres = seed_centres(x, clusters, generator)
        if settings.batch_size is None:
            centres, history = lloyd(x, centres, settings)
        else:
            centres, history = mini_batches(x, centres, settings, generator)
        inertia = float(nearest_centre(x, centres)[1].double().sum())
        if best is None or inertia < best[0]:
            best = (inertia, centres, history)
    assert best is not None
    model["centres"] = best[1]
    return Clustering(
        labels=nearest_centre(x, best[1])[0].numpy(),
        history=[{"iteration": i, "inertia": v} for i, v in enumerate(best[2])],
        model=model,
    )


def predict(model: Mapping[str, Tensor], x: Tensor) -> np.ndarray:
    """Cluster (N,) int64 of the nearest centre for x (N, D)."""
    return nearest_centre(apply_norm(model, x), model["centres"])[0].numpy()

"""Agglomerative hierarchical clustering by nearest-neighbour chains on centroids.

Sources: Murtagh 1983 and Muellner 2011, algorithm 3 (the nearest-neighbour chain). Follow nearest
neighbours until two clusters are each other's nearest, merge them, go on from the rest of the
chain. For reducible linkages this gives the dendrogram of the greedy algorithm with at most 3N
neighbour queries.

Average linkage on cosine distance and Ward both depend on centroids alone:

    average:  d(A, B) = mean_{a in A, b in B} (1 - a.b) = 1 - m_A . m_B         (unit rows)
    ward:     d(A, B)^2 = 2 |A||B| / (|A| + |B|) * |m_A - m_B|^2

so they need O(N D) memory and no N x N matrix. Complete and single linkage (on cosine distance)
need all pairs and go through SciPy.

The study names no linkage; average cosine is our default: on length-normalised i-vectors the score
is the cosine.

N utterances, D dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from goldcrest.kernels.clustering.normalisation import Norm, apply_norm, check_norm, fit_norm
from goldcrest.kernels.clustering.result import Clustering, Train, check_input

Linkage = Literal["average", "ward", "complete", "single"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of agglomerative clustering."""

    norm: Norm = "l2"  # normalisation of the vectors: l2 (rows), standard (columns), none
    linkage: Linkage = "average"  # average, complete, single: cosine distance; ward: Euclidean
    max_pairs: int = 500_000_000  # most pairs held in memory by complete and single (8 bytes each)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_norm(self.norm)
        if self.linkage not in get_args(Linkage):
            known = ", ".join(get_args(Linkage))
            raise ValueError(f"ahc: unknown linkage '{self.linkage}'; there are {known}")
        if self.max_pairs < 1:
            raise ValueError(f"ahc: max_pairs must be at least 1, got {self.max_pairs}")


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of x (N, D) at unit length, float64; zero rows stay zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _average(means: np.ndarray, sizes: np.ndarray, tip: int) -> np.ndarray:
    """Cosine average linkage (n,) of cluster `tip` to all, from centroids (n, D) of unit rows."""
    return 1.0 - means @ means[tip]


def _ward(means: np.ndarray, sizes: np.ndarray, tip: int) -> np.ndarray:
    """Ward distance (n,) of cluster `tip` to all; between single vectors the Euclidean distance."""
    squares = np.einsum("nd,nd->n", means, means)
    gaps = np.maximum(squares + squares[tip] - 2.0 * (means @ means[tip]), 0.0)
    return np.sqrt(2.0 * sizes * sizes[tip] / (sizes + sizes[tip]) * gaps)


_LINKAGES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "average": _average,
    "ward": _ward,
}


def nearest_neighbour_chain(x: np.ndarray, linkage: Literal["average", "ward"]) -> np.ndarray:
    """Merges (N - 1, 4) float64 as in SciPy: the two clusters, the distance, the new size.

    x (N, D) float64, rows at unit length for `average`. Cluster N + i is made by merge i. Ties are
    broken by row order. Twin: `linkage_reference`.
    """
    distance = _LINKAGES[linkage]
    means, sizes = x.copy(), np.ones(len(x))
    names = np.arange(len(x))  # a vector of each live cluster, to find it again after sorting
    live = np.ones(len(x), bool)
    chain: list[int] = []
    merges: list[tuple[int, int, float]] = []
    while len(merges) < len(x) - 1:
        if not chain:
            if 2 * live.sum() < len(live):  # forget merged clusters, now and then
                means, sizes, names, live = means[live], sizes[live], names[live], live[live]
            chain = [int(live.argmax())]
        tip = chain[-1]
        gaps = distance(means, sizes, tip)
        gaps[~live] = np.inf
        gaps[tip] = np.inf
        nearest = int(gaps.argmin())
        if len(chain) > 1 and gaps[chain[-2]] <= gaps[nearest]:
            into = chain[-2]  # mutual nearest neighbours
            del chain[-2:]
            merges.append((int(names[tip]), int(names[into]), float(gaps[into])))
            both = sizes[tip] + sizes[into]
            means[into] = (sizes[tip] * means[tip] + sizes[into] * means[into]) / both
            sizes[into], live[tip] = both, False
        else:
            chain.append(nearest)
    return _sorted_merges(merges, len(x))


def _sorted_merges(merges: list[tuple[int, int, float]], rows: int) -> np.ndarray:
    """Merges named by member vectors, in any order -> SciPy's matrix, by rising distance."""
    parent = np.arange(2 * rows - 1)
    sizes = np.ones(2 * rows - 1)
    out = np.empty((rows - 1, 4))
    order = np.argsort([height for _, _, height in merges], kind="stable")
    for place, index in enumerate(order):
        a, b, height = merges[int(index)]
        roots = sorted((_root(parent, a), _root(parent, b)))
        parent[roots] = rows + place
        sizes[rows + place] = sizes[roots].sum()
        out[place] = (*roots, height, sizes[rows + place])
    return out


def _root(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = int(parent[node])
    return node


def linkage_reference(x: np.ndarray, linkage: Linkage) -> np.ndarray:
    """SciPy's merges (N - 1, 4) from all pairs of x (N, D): the twin of the chain, and the way of
    complete and single linkage."""
    return scipy_linkage(pdist(x, "euclidean" if linkage == "ward" else "cosine"), linkage)


def cut(merges: np.ndarray, clusters: int) -> np.ndarray:
    """Labels (N,) int64 of the partition into exactly `clusters`, numbered by first appearance."""
    rows = len(merges) + 1
    parent = np.arange(2 * rows - 1)
    for place in range(rows - clusters):
        parent[merges[place, :2].astype(int)] = rows + place
    roots = np.array([_root(parent, row) for row in range(rows)])
    _, first, labels = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[labels]


def dendrogram(x: Tensor, settings: Settings) -> np.ndarray:
    """All merges (N - 1, 4) of x (N, D), already normalised; one dendrogram serves every C."""
    rows = np.asarray(x, np.float64) if settings.linkage == "ward" else unit_rows(x.numpy())
    if settings.linkage in ("average", "ward"):
        return nearest_neighbour_chain(rows, settings.linkage)
    pairs = len(rows) * (len(rows) - 1) // 2
    if pairs > settings.max_pairs:
        raise ValueError(
            f"ahc: {settings.linkage} linkage of {len(rows)} vectors needs {pairs} pairs in memory,"
            f" over max_pairs = {settings.max_pairs}; use average or ward"
        )
    return linkage_reference(rows, settings.linkage)


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
    """Cluster x (N, D) float32 into exactly `clusters` clusters; nothing in it is random.

    `seed`, `train`, `augmented` and `truth` belong to the common face and are not used. `model`
    holds the centroids and all `merges`. Raises ValueError on bad input.
    """
    check_input(x, clusters)
    model = fit_norm(x, settings.norm)
    x = apply_norm(model, x)
    merges = dendrogram(x, settings)
    labels = cut(merges, clusters)
    rows = x.double() if settings.linkage == "ward" else torch.from_numpy(unit_rows(x.numpy()))
    place = torch.from_numpy(labels)
    sums = torch.zeros(clusters, x.shape[1], dtype=torch.float64).index_add_(0, place, rows)
    model["centroids"] = (sums / place.bincount(minlength=clusters)[:, None]).float()
    model["euclidean"] = torch.tensor([settings.linkage == "ward"])
    model["merges"] = torch.from_numpy(merges)
    return Clustering(labels=labels, history=[], model=model)


def predict(model: Mapping[str, Tensor], x: Tensor) -> np.ndarray:
    """Cluster (N,) int64 for x (N, D): least average cosine distance to the members, which is least
    1 - x.m; for Ward the nearest centroid. (Complete and single linkage use the average too.)"""
    x, centroids = apply_norm(model, x), model["centroids"]
    if bool(model["euclidean"]):
        scores = 2 * x @ centroids.T - centroids.square().sum(dim=1)
    else:
        scores = x @ centroids.T
    return scores.argmax(dim=1).numpy()

"""The eleven clustering metrics: seven against the truth, three from the vectors, and the count.

Source: Fathan & Alam 2025, section on metrics; Vinh, Epps & Bailey 2010 (adjusted mutual
information); Rousseeuw 1987 (silhouette); Calinski & Harabasz 1974; Davies & Bouldin 1979.

Contingency W[c, k] = number of utterances with label c and true class k; row sums a, column sums b.
Natural logarithms. Every metric but the three on vectors lies in [.., 1], 1 for the truth itself.

N utterances, D dimensions, C clusters, K true classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.special import gammaln

SUPERVISED = ("acc", "ami", "nmi", "completeness", "homogeneity", "fmi", "purity")
_BLOCK = 1 << 22  # numbers in a working array
UNSUPERVISED = ("silhouette", "calinski_harabasz", "davies_bouldin")


@dataclass(frozen=True)
class Contingency:
    """Non-zero cells of the contingency table: their row, column and count, and the margins."""

    rows: np.ndarray  # (cells,) int64, cluster of a cell
    columns: np.ndarray  # (cells,) int64, true class of a cell
    counts: np.ndarray  # (cells,) float64, utterances in a cell
    a: np.ndarray  # (C,) float64, utterances of a cluster
    b: np.ndarray  # (K,) float64, utterances of a true class

    @property
    def total(self) -> float:
        """N, the number of utterances."""
        return float(self.a.sum())


def contingency(labels: np.ndarray, truth: np.ndarray) -> Contingency:
    """The table of labels (N,) against truth (N,), of any comparable types; only used values count.

    Raises ValueError for empty input or different lengths.
    """
    labels, truth = np.asarray(labels), np.asarray(truth)
    if labels.ndim != 1 or labels.shape != truth.shape or len(labels) == 0:
        raise ValueError(
            f"labels and truth must be vectors of one length, got {labels.shape}, {truth.shape}"
        )
    _, c = np.unique(labels, return_inverse=True)
    _, k = np.unique(truth, return_inverse=True)
    table = coo_array((np.ones(len(c)), (c, k)))
    table.sum_duplicates()
    return Contingency(
        table.coords[0], table.coords[1], table.data, np.bincount(c) * 1.0, np.bincount(k) * 1.0
    )


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return max(float(-(p * np.log(p)).sum()), 0.0)


def mutual_information(table: Contingency) -> float:
    """I = sum W/N log(N W / (a b)), nats, not below 0."""
    expected = table.a[table.rows] * table.b[table.columns]
    logs = np.log(table.counts) + np.log(table.total) - np.log(expected)
    return max(float((table.counts * logs).sum() / table.total), 0.0)


def expected_mutual_information(table: Contingency) -> float:
    """E[I], nats, of random labellings with the same margins (hypergeometric; Vinh, equation 24a).

    Depends on the margins by their *values* only, so each pair of different values is done once:
    seconds where a loop over all C * K pairs takes minutes.
    """
    n = table.total
    a_values, a_times = np.unique(table.a, return_counts=True)
    b_values, b_times = np.unique(table.b, return_counts=True)
    result = 0.0
    for a, times in zip(a_values, a_times, strict=True):
        w = np.arange(1.0, min(a, b_values[-1]) + 1)[:, None]  # possible counts of a cell
        step = max(1, _BLOCK // len(w))  # a collapsed clustering has very many counts
        for start in range(0, len(b_values), step):
            b = b_values[None, start : start + step]
            shares = _expected_shares(w, float(a), b, float(n)).sum(axis=0)
            result += float(times * (shares * b_times[start : start + step]).sum())
    return result


def _expected_shares(w: np.ndarray, a: float, b: np.ndarray, n: float) -> np.ndarray:
    """w/n log(n w / (a b)) P(w | a, b, n) (W, K): counts w (W, 1), cluster a, classes b (1, K)."""
    possible = (w <= b) & (w >= a + b - n)
    rest = np.where(possible, b - w, 0.0)
    outside = np.where(possible, n - a - b + w, 0.0)
    log_p = gammaln(a + 1) + gammaln(b + 1) + gammaln(n - a + 1) + gammaln(n - b + 1)
    log_p = log_p - gammaln(n + 1) - gammaln(w + 1) - gammaln(a - w + 1)
    log_p = log_p - gammaln(rest + 1) - gammaln(outside + 1)
    p = np.exp(np.where(possible, log_p, -np.inf))
    return w / n * np.log(n * w / (a * b)) * p


def _one_to_one(table: Contingency) -> bool:
    """Whether clusters and classes are the same partition."""
    return len(table.counts) == len(table.a) == len(table.b)


def adjusted_mutual_information(labels: np.ndarray, truth: np.ndarray) -> float:
    """AMI = (I - E[I]) / (mean(H) - E[I]); about 0 for random labels, 1 for the truth."""
    return _ami(contingency(labels, truth))


def _ami(table: Contingency) -> float:
    if _one_to_one(table):
        return 1.0
    expected = expected_mutual_information(table)
    room = (_entropy(table.a) + _entropy(table.b)) / 2 - expected
    gain = mutual_information(table) - expected
    return gain / room if abs(room) > 1e-12 else 0.0


def normalised_mutual_information(labels: np.ndarray, truth: np.ndarray) -> float:
    """NMI = 2 I / (H(Y) + H(C)), 1 where both partitions are trivial."""
    return _nmi(contingency(labels, truth))


def _nmi(table: Contingency) -> float:
    both = _entropy(table.a) + _entropy(table.b)
    return 2 * mutual_information(table) / both if both > 0 else 1.0


def accuracy(labels: np.ndarray, truth: np.ndarray) -> float:
    """ACC: best one-to-one map of clusters to classes (Hungarian); the unmatched are errors."""
    return _accuracy(contingency(labels, truth))


def _accuracy(table: Contingency) -> float:
    dense = np.zeros((len(table.a), len(table.b)))
    dense[table.rows, table.columns] = table.counts
    return float(dense[linear_sum_assignment(dense, maximize=True)].sum() / table.total)


def _fowlkes_mallows(table: Contingency) -> float:
    """TP / sqrt((TP + FP)(TP + FN)) over pairs; without pairs 1 if both have none, else 0."""
    n = table.total
    found, true = np.square(table.a).sum() - n, np.square(table.b).sum() - n
    if found * true == 0:
        return 1.0 if found == true else 0.0
    return float((np.square(table.counts).sum() - n) / np.sqrt(found) / np.sqrt(true))


def supervised_metrics(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The seven metrics of `SUPERVISED` for labels (N,) against truth (N,)."""
    table = contingency(labels, truth)
    shared = mutual_information(table)
    classes, found = _entropy(table.b), _entropy(table.a)
    best = np.zeros(len(table.a))
    np.maximum.at(best, table.rows, table.counts)
    return {
        "acc": _accuracy(table),
        "ami": _ami(table),
        "nmi": _nmi(table),
        "completeness": shared / found if found > 0 else 1.0,
        "homogeneity": shared / classes if classes > 0 else 1.0,
        "fmi": _fowlkes_mallows(table),
        "purity": float(best.sum() / table.total),
    }


def _group_sums(x: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """Sums (C, ...) of the rows of x (N, ...) by label."""
    members = coo_array((np.ones(len(x)), (labels, np.arange(len(x)))), (clusters, len(x)))
    return members.tocsr() @ x


def silhouette(
    x: np.ndarray, labels: np.ndarray, *, sample: int | None = 5000, seed: int = 0
) -> float | None:
    """Mean silhouette (b - a)/max(a, b) of x (N, D), Euclidean; 0 for a cluster of one.

    Exact values (distances to all N rows) of at most `sample` random rows (None: all). None unless
    there are 2 to N - 1 clusters.
    """
    values, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(values) <= len(x) - 1:
        return None
    x = np.asarray(x, np.float64)
    rows = np.arange(len(x))
    if sample is not None and sample < len(x):
        rows = np.sort(np.random.default_rng(seed).choice(len(x), sample, replace=False))
    squares = np.square(x).sum(axis=1)
    scores = []
    for block in np.array_split(rows, max(1, len(rows) * len(x) // 4_000_000)):
        squared = squares[block, None] + squares - 2 * x[block] @ x.T
        squared[np.arange(len(block)), block] = 0.0
        distances = np.sqrt(np.maximum(squared, 0.0))
        sums = _group_sums(distances.T, labels, len(values)).T  # (block, C)
        own = (np.arange(len(block)), labels[block])
        inside = sums[own] / np.maximum(sizes[labels[block]] - 1, 1)
        means = sums / sizes
        means[own] = np.inf
        outside = means.min(axis=1)
        larger = np.maximum(inside, outside)
        score = (outside - inside) / np.where(larger > 0, larger, 1.0)
        scores.append(np.where(sizes[labels[block]] > 1, score, 0.0))
    return float(np.concatenate(scores).mean())


def calinski_harabasz(x: np.ndarray, labels: np.ndarray) -> float | None:
    """[tr(B)/(C - 1)] / [tr(Wd)/(N - C)] of x (N, D): between against within, higher is better.

    None unless there are 2 to N - 1 clusters, or where the clusters have no width.
    """
    values, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(values) <= len(x) - 1:
        return None
    x = np.asarray(x, np.float64)
    means = _group_sums(x, labels, len(values)) / sizes[:, None]
    within = np.square(x - means[labels]).sum()
    between = (sizes[:, None] * np.square(means - x.mean(axis=0))).sum()
    if within == 0:
        return None
    return float(between / (len(values) - 1) / (within / (len(x) - len(values))))


def davies_bouldin(x: np.ndarray, labels: np.ndarray) -> float | None:
    """mean_i max_j (s_i + s_j)/d(m_i, m_j), s the mean distance to the centroid; lower is better.

    None unless there are 2 to N - 1 clusters. Two clusters with one centroid are left out of each
    other's maximum, as in scikit-learn.
    """
    values, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(values) <= len(x) - 1:
        return None
    x = np.asarray(x, np.float64)
    means = _group_sums(x, labels, len(values)) / sizes[:, None]
    widths = np.bincount(labels, np.linalg.norm(x - means[labels], axis=1)) / sizes
    squares = np.square(means).sum(axis=1)
    gaps = np.sqrt(np.maximum(squares[:, None] + squares - 2 * means @ means.T, 0.0))
    np.fill_diagonal(gaps, np.inf)
    gaps[gaps < 1e-12] = np.inf
    return float(((widths[:, None] + widths) / gaps).max(axis=1).mean())


def clustering_metrics(
    labels: np.ndarray,
    truth: np.ndarray | None = None,
    x: np.ndarray | None = None,
    *,
    silhouette_sample: int | None = 5000,
    seed: int = 0,
) -> dict[str, float | None]:
    """All metrics that the input allows, in one call.

    labels (N,), truth (N,) for the seven supervised ones, x (N, D) for the three on vectors (None
    where they are not defined), always `clusters`, the number of different labels.
    """
    metrics: dict[str, float | None] = {"clusters": float(len(np.unique(labels)))}
    if truth is not None:
        metrics |= supervised_metrics(labels, truth)
    if x is not None:
        metrics["silhouette"] = silhouette(x, labels, sample=silhouette_sample, seed=seed)
        metrics["calinski_harabasz"] = calinski_harabasz(x, labels)
        metrics["davies_bouldin"] = davies_bouldin(x, labels)
    return metrics

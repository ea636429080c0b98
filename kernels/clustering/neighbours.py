"""Distance to the k-th nearest neighbour: the local scale of the data.

IMSAT (Hu et al. 2017, section 4.1) perturbs a sample by a quarter of its distance to its 10th
nearest neighbour: eps_i = 0.25 * dist_10(x_i). Exact, by chunks, never N x N in memory.

N utterances, D dimensions, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_distance(
    x: Tensor, k: int, *, queries: Tensor | None = None, chunk: int = 2048
) -> Tensor:
    """Euclidean distance (Q,) of rows of x (N, D) to their k-th nearest other row.

    `queries` (Q,) int64 are row numbers, all rows by default. k is cut to N - 1; a single row has
    distance 0. Distances come from |a|^2 + |b|^2 - 2ab on centred rows.
    """
    rows = torch.arange(len(x), device=x.device) if queries is None else queries
    k = min(k, len(x) - 1)
    if k < 1:
        return x.new_zeros(len(rows))
    centred = x - x.mean(dim=0)
    squares = centred.square().sum(dim=1)
    found = []
    for block in rows.split(chunk):
        squared = squares[block, None] + squares - 2 * centred[block] @ centred.T
        squared[torch.arange(len(block), device=x.device), block] = torch.inf
        found.append(squared.kthvalue(k, dim=1).values.clamp_min(0).sqrt())
    return torch.cat(found)


def neighbour_distance_reference(x: Tensor, k: int) -> Tensor:
    """The plain twin of `neighbour_distance` for all rows: sort the whole distance matrix."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(-1.0)  # the row itself comes first, whatever its duplicates
    return distances.sort(dim=1).values[:, min(k, len(x) - 1)].clamp_min(0)


def typical_neighbour_distance(x: Tensor, k: int, *, sample: int = 20_000, seed: int = 0) -> float:
    """Median distance to the k-th neighbour over at most `sample` random rows of x (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[:sample].to(x.device)
    return float(neighbour_distance(x, k, queries=rows).median())

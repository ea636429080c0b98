"""Masks: choosing the lowest scores exactly, counting zeros; whoever trains holds them.

A mask is boolean in the shape of its weight, True where the weight stays. Counts are exact: a
threshold prunes one weight too many on ties, a sort does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]
"""Mask of each layer's weight, by the layer's name in the model."""


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless `sparsity` is a share in [0, 1]."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be a share in [0, 1], not {sparsity}")


def check_pattern(pattern: tuple[int, int] | None) -> None:
    """Raise ValueError unless `pattern` is None or (n, m) with 0 < n < m."""
    if pattern is not None and not (len(pattern) == 2 and 0 < pattern[0] < pattern[1]):
        raise ValueError(f"pattern must be (n zeros, of m) with 0 < n < m, not {pattern}")


def keep_highest(scores: Tensor, zeros: int) -> Tensor:
    """Mask with exactly `zeros` False entries at the lowest scores; ties go in storage order."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.reshape(-1).argsort(stable=True)[:zeros]] = False
    return mask.reshape(scores.shape)


def keep_highest_by_row(scores: Tensor, sparsity: float) -> Tensor:
    """`keep_highest` within every row of (R, D); rows' counts round so that the total is exact."""
    rows, columns = scores.shape
    ends = [round(sparsity * (columns * row)) for row in range(rows + 1)]
    zeros = torch.tensor(ends, device=scores.device).diff()
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= zeros[:, None]


def keep_n_of_m(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """n:m pattern: in every run of m columns of (R, D), the n lowest scores go.

    Raises ValueError if m does not divide D.
    """
    zeros, run = pattern
    rows, columns = scores.shape
    if columns % run:
        raise ValueError(f"a pattern of {zeros}:{run} does not divide {columns} columns")
    ranks = scores.reshape(rows, -1, run).argsort(dim=2, stable=True).argsort(dim=2)
    return (ranks >= zeros).reshape(rows, columns)


def follows_pattern(mask: Tensor, pattern: tuple[int, int]) -> bool:
    """Whether every run of m columns of `mask` (R, D) has at least n zeros."""
    zeros, run = pattern
    return bool(((~mask).reshape(mask.shape[0], -1, run).sum(dim=2) >= zeros).all())


def masks_of(model: nn.Module, names: Iterable[str]) -> Masks:
    """Masks of the zeros that the named layers' weights have now."""
    return {name: _weight(model, name).detach() != 0 for name in names}


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of pruned weights over all masks, 0 for none."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int((~mask).sum()) for mask in masks.values()) / total if total else 0.0


def realised_sparsity(model: nn.Module, names: Iterable[str]) -> float:
    """Share of weights of the named layers that are exactly zero."""
    return sparsity(masks_of(model, names))


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"layer '{name}' has no weight tensor")
    return weight

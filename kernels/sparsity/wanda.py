"""Wanda: prune by weight times input norm, within every row, nothing is corrected.

Source: M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
ICLR 2024, equation (1):  score_ij = |W_ij| ||x_j||,  compared within output i.

R rows   D columns   ||x_j||^2 = H_jj / 2 with H = 2 X X^T
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from goldcrest.kernels.sparsity.masks import (
    check_pattern,
    check_sparsity,
    keep_highest_by_row,
    keep_n_of_m,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of Wanda."""

    pattern: tuple[int, int] | None = None  # (n, m): n zeros in every m columns

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", tuple(self.pattern))  # JSON gives lists
        check_pattern(self.pattern)


def prune(
    weight: Tensor, hessian: Tensor, *, sparsity: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Zero the lowest scores of every row of (R, D), round(sparsity * R * D) in all.

    Returns the new weight and its mask. Raises ValueError for a sparsity outside [0, 1].
    """
    check_sparsity(sparsity)
    norms = (hessian.diagonal() / 2).sqrt()
    scores = weight.detach().abs().to(norms.dtype) * norms
    if settings.pattern is None:
        mask = keep_highest_by_row(scores, sparsity)
    else:
        mask = keep_n_of_m(scores, settings.pattern)
    return weight.detach() * mask, mask

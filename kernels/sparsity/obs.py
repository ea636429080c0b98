"""Exact optimal brain surgeon, row by row: the reference that SparseGPT approximates.

Sources: B. Hassibi, D. Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
Surgeon", NeurIPS 1992; E. Frantar, D. Alistarh, "Optimal Brain Compression", NeurIPS 2022,
section 4 (removal of a weight from H^-1).

    error of pruning q:   w_q^2 / (2 [H^-1]_qq)
    correction:           dw = -w_q / [H^-1]_qq  [H^-1]_:,q
    H^-1 without q:       H^-1 - [H^-1]_:,q [H^-1]_q,: / [H^-1]_qq

Every row has masks and an inverse of its own: O(R D^3). Meant for D up to a few hundred.

R rows   D columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.sparsity.hessian import inverse_factor
from goldcrest.kernels.sparsity.masks import check_sparsity


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the exact surgeon."""

    damping: float = 0.01  # lambda as a share of mean(diag H)

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must be at least 0, not {self.damping}")


def surgeon_step(row: Tensor, inverse: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Prune one weight of a row (D,) and correct the others; also H^-1 (D, D) without it."""
    pivot = inverse[column, column]
    corrected = row - row[column] / pivot * inverse[:, column]
    corrected[column] = 0.0
    smaller = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return corrected, smaller


def prune(
    weight: Tensor, hessian: Tensor, *, sparsity: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Prune every row of (R, D) greedily, always the weight of least error at that moment.

    Rows' counts round so that round(sparsity * R * D) weights are pruned in all. Returns the new
    weight and its mask. Raises ValueError for a sparsity outside [0, 1].
    """
    check_sparsity(sparsity)
    factor = inverse_factor(hessian, settings.damping)
    inverse = factor.upper.t() @ factor.upper
    work = weight.detach().to(inverse.dtype, copy=True)
    work[:, factor.dead] = 0.0
    mask = torch.ones_like(work, dtype=torch.bool)
    columns = work.shape[1]
    for index in range(work.shape[0]):
        before, after = columns * index, columns * (index + 1)
        zeros = round(sparsity * after) - round(sparsity * before)
        work[index], mask[index] = _prune_row(work[index], inverse, zeros)
    return work.to(weight.dtype), mask


def _prune_row(row: Tensor, inverse: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    alive = torch.ones_like(row, dtype=torch.bool)
    for _ in range(zeros):
        errors = row.square() / (2 * inverse.diagonal())
        column = int(errors.masked_fill(~alive, torch.inf).argmin())
        row, inverse = surgeon_step(row, inverse, column)
        alive[column] = False
        row = row * alive
    return row, alive


def least_squares(weight: Tensor, damped: Tensor, mask: Tensor) -> Tensor:
    """The best weights (R, D) that `mask` allows: min 0.5 tr(dW H dW^T), each row solved exactly.

    `damped` is a positive definite H (D, D).
    """
    solved = torch.zeros_like(weight, dtype=damped.dtype)
    target = weight.to(damped.dtype) @ damped
    for index, keep in enumerate(mask):
        kept = keep.nonzero()[:, 0]
        solved[index, kept] = torch.linalg.solve(damped[kept][:, kept], target[index, kept])
    return solved

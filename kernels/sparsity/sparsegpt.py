"""SparseGPT: one-shot pruning with corrections of the weights that stay.

Source: E. Frantar, D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", ICML 2023, section 3 and algorithm 1.

Columns go left to right; pruning column j with error e_j = W_j / U_jj corrects the columns on its
right by -e_j U_j,j+1:, the optimal-brain-surgeon step of a Hessian that all rows share.
Corrections beyond a block are applied once per block (lazily), as one matrix product.

R rows   D columns   H = 2 X X^T (D, D)   U upper Cholesky factor of the inverse of damped H

The loss identity  sum 0.5 e^2 = 0.5 tr(dW H dW^T)  holds exactly with the damped H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.sparsity.hessian import Factor, inverse_factor
from goldcrest.kernels.sparsity.masks import (
    check_pattern,
    check_sparsity,
    keep_highest,
    keep_n_of_m,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of SparseGPT."""

    block: int = 128  # columns whose mask is chosen together and corrected lazily, B_s
    damping: float = 0.01  # lambda as a share of mean(diag H)
    pattern: tuple[int, int] | None = None  # (n, m): n zeros in every m columns, e.g. (2, 4)
    keep_zeros: bool = False  # zeros of the incoming weight stay zero (nested masks, one by one)

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", tuple(self.pattern))  # JSON gives lists
        check_pattern(self.pattern)
        if self.block < 1:
            raise ValueError(f"block must be at least 1 column, not {self.block}")
        if self.pattern is not None and self.block % self.pattern[1]:
            raise ValueError(
                f"block ({self.block} columns) must be a multiple of the pattern's m "
                f"({self.pattern[1]})"
            )
        if self.damping < 0:
            raise ValueError(f"damping must be at least 0, not {self.damping}")


def prune(
    weight: Tensor, hessian: Tensor, *, sparsity: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Prune a weight to `sparsity` (ignored with a pattern) and correct what stays.

    Args:
        weight: (R, D).
        hessian: 2 X X^T (D, D); its precision is the one computed in.
        sparsity: share of zeros; round(sparsity * R * D) weights are pruned exactly. A block's
            share may be spread unevenly over its rows.

    Returns:
        new weight (R, D) in the precision of `weight`, and its mask (R, D).

    Raises:
        ValueError: a sparsity outside [0, 1], an H that does not fit or is not finite.
    """
    check_sparsity(sparsity)
    factor = inverse_factor(hessian, settings.damping)
    work = _without_dead(weight, factor)
    existing = (weight == 0) if settings.keep_zeros else torch.zeros_like(work, dtype=torch.bool)
    mask = torch.ones_like(work, dtype=torch.bool)
    rows, columns = work.shape
    pruned = 0
    for start in range(0, columns, settings.block):
        end = min(start + settings.block, columns)
        scores = (work[:, start:end] / factor.upper.diagonal()[start:end]).square()
        scores = scores.masked_fill(existing[:, start:end], -torch.inf)
        if settings.pattern is None:
            due = round(sparsity * (rows * end)) - pruned
            due = max(due, int(existing[:, start:end].sum()))
            mask[:, start:end] = keep_highest(scores, due)
            pruned += due
        else:
            mask[:, start:end] = _pattern_block(work, existing, factor, start, end, settings)
        # Corrections have moved the zeros that stay: pruning them passes that on to the right.
        _prune_block(work, mask, factor.upper, start, end)
    return (work * mask).to(weight.dtype), mask


def prune_with_mask(
    weight: Tensor, hessian: Tensor, mask: Tensor, settings: Settings
) -> tuple[Tensor, float]:
    """Correct the weights that a given mask keeps; also the loss sum 0.5 e^2 of the pruning."""
    factor = inverse_factor(hessian, settings.damping)
    work = _without_dead(weight, factor)
    loss = 0.0
    for start in range(0, work.shape[1], settings.block):
        end = min(start + settings.block, work.shape[1])
        errors = _prune_block(work, mask, factor.upper, start, end)
        loss += 0.5 * float(errors.square().sum())
    return (work * mask).to(weight.dtype), loss


def prune_with_mask_reference(
    weight: Tensor, hessian: Tensor, mask: Tensor, settings: Settings
) -> Tensor:
    """`prune_with_mask` column by column from the inverses themselves: O(D^4), for tests.

    [(H_j:,j:)^-1] is inverted anew for every column; the update is the surgeon's,
    dw = -w_j / [H^-1]_jj [H^-1]_j,: .
    """
    factor = inverse_factor(hessian, settings.damping)
    work = _without_dead(weight, factor)
    for column in range(work.shape[1]):
        inverse = torch.linalg.inv(factor.damped[column:, column:])
        pruned = work[:, column] * ~mask[:, column]
        work[:, column:] -= pruned[:, None] * inverse[0] / inverse[0, 0]
    return (work * mask).to(weight.dtype)


def _without_dead(weight: Tensor, factor: Factor) -> Tensor:
    """The weight to work on, inputs that never fire set to zero (step 1)."""
    if weight.ndim != 2 or weight.shape[1] != factor.upper.shape[0]:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not fit an H of size "
            f"{factor.upper.shape[0]}"
        )
    work = weight.detach().to(factor.upper.dtype, copy=True)
    work[:, factor.dead] = 0.0
    return work


def _pattern_block(
    work: Tensor, existing: Tensor, factor: Factor, start: int, end: int, settings: Settings
) -> Tensor:
    """Mask of one block under an n:m pattern, choosing each run of m when its turn comes.

    Scores of a run must see the corrections from the runs before it, so they are made on a copy.
    """
    assert settings.pattern is not None
    run = settings.pattern[1]
    trial = work[:, start:end].clone()
    mask = torch.ones_like(trial, dtype=torch.bool)
    upper = factor.upper[start:end, start:end]
    for first in range(0, end - start, run):
        last = min(first + run, end - start)
        scores = (trial[:, first:last] / upper.diagonal()[first:last]).square()
        scores = scores.masked_fill(existing[:, start + first : start + last], -torch.inf)
        mask[:, first:last] = keep_n_of_m(scores, settings.pattern)
        mask[:, first:last] &= ~existing[:, start + first : start + last]
        _prune_block(trial, mask, upper, first, last)
    return mask


def _prune_block(work: Tensor, mask: Tensor, upper: Tensor, start: int, end: int) -> Tensor:
    """Prune columns start:end in place and correct all columns to the right; the errors e."""
    errors = torch.zeros_like(work[:, start:end])
    for column in range(start, end):
        error = (work[:, column] * ~mask[:, column]) / upper[column, column]
        work[:, column:end] -= error[:, None] * upper[column, column:end]
        errors[:, column - start] = error
    work[:, end:] -= errors @ upper[start:end, end:]
    return errors

"""GPTQ: rounding of weights column by column, each error corrected on the columns to come.

Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1.

    for j = 0..D-1:   e = (W_j - s q_j) / U_jj,   q_j = round(W_j / s),   W_:,k>j -= e U_jk

U is the upper Cholesky factor of H^-1, H = 2 X X^T + lambda I; corrections beyond a block are
applied once per block. `recursion` is that loop for any grid (the groups of `weight_only.gptq` use
it too); `quantize` runs it on the symmetric grid per output channel of `int8`, taken from the
weight before any correction; on it 0 is exact, so pruned weights stay pruned.

R rows (output channels)   D columns (inputs)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.quantization.int8 import WEIGHT_LEVELS
from goldcrest.kernels.sparsity.hessian import inverse_factor

RoundColumn = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(position, work (R, D)) -> codes (R,) of work's column at that position, and their values (R,).

`work` is the weight in the order worked in, corrected for everything left of `position`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of GPTQ."""

    block: int = 128  # columns corrected lazily together
    damping: float = 0.01  # lambda as a share of mean(diag H)
    act_order: bool = False  # columns of large diag H first, while there is room for corrections

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1 column, not {self.block}")
        if self.damping < 0:
            raise ValueError(f"damping must be at least 0, not {self.damping}")


def quantize(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    settings: Settings,
    *,
    mask: Tensor | None = None,
    levels: int = WEIGHT_LEVELS,
) -> Tensor:
    """Codes int8 (R, D) of a weight (R, D), weight ~ scales[:, None] * codes.

    Args:
        weight: (R, D) float.
        hessian: 2 X X^T (D, D); its precision is the one computed in.
        scales: (R,) step of each row's grid.
        mask: (R, D) bool, False where a pruned weight must stay zero; None for a dense weight.
        levels: largest code, 127 for int8, 7 for symmetric 4 bits.

    Raises:
        ValueError: an H that does not fit or is not finite.
    """
    check_fit(weight, hessian)
    order = column_order(hessian, act_order=settings.act_order)
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask[:, order]
    step = scales.to(hessian.dtype)

    def round_column(position: int, work: Tensor) -> tuple[Tensor, Tensor]:
        rounded = torch.round(work[:, position] / step).clamp(-levels, levels)
        codes = torch.where(keep[:, position], rounded, 0.0)
        return codes, step * codes

    codes = recursion(
        weight, hessian, round_column, order=order, block=settings.block, damping=settings.damping
    )
    return codes.to(torch.int8)


def check_fit(weight: Tensor, hessian: Tensor) -> None:
    """Raise ValueError unless H is (D, D) for a weight (R, D)."""
    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not fit an H of {tuple(hessian.shape)}"
        )


def column_order(hessian: Tensor, *, act_order: bool) -> Tensor:
    """The order (D,) in which columns are rounded: as stored, or by falling diag H."""
    if act_order:
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def recursion(
    weight: Tensor,
    hessian: Tensor,
    round_column: RoundColumn,
    *,
    order: Tensor,
    block: int,
    damping: float,
    group: int = 1,
) -> Tensor:
    """Algorithm 1 on any grid: codes (R, D), in the precision of H, in the weight's column order.

    Args:
        weight: (R, D) float.
        hessian: 2 X X^T (D, D); its precision is the one computed in.
        round_column: the grid.
        order: (D,) columns in the order to round them in.
        block: columns corrected lazily together.
        damping: lambda as a share of mean(diag H).
        group: columns whose grid `round_column` takes from `work` together, at the first of them.
            A block ends before a group that would reach beyond it, so that the whole group has
            been corrected by then: the result does not depend on `block`.
    """
    factor = inverse_factor(hessian[order][:, order], damping)
    work = weight.detach()[:, order].to(factor.upper.dtype, copy=True)
    work[:, factor.dead] = 0.0  # never seen, so its code is free: zero stores and prunes best
    codes = torch.empty_like(work)
    start = 0
    while start < work.shape[1]:
        end = _block_end(start, work.shape[1], block, group)
        errors = torch.zeros_like(work[:, start:end])
        for column in range(start, end):
            codes[:, column], values = round_column(column, work)
            error = (work[:, column] - values) / factor.upper[column, column]
            work[:, column:end] -= error[:, None] * factor.upper[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ factor.upper[start:end, end:]
        start = end
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def _block_end(start: int, columns: int, block: int, group: int) -> int:
    """Where the block from `start` ends: whole groups if one fits, else inside the one begun."""
    if start + block >= columns:
        return columns
    last_group = (start + block) // group * group
    return last_group if last_group > start else start + block


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """0.5 tr(dW H dW^T), the squared error of the layer's output on the calibration inputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return 0.5 * float(((difference @ hessian) * difference).sum())

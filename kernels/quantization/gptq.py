"""GPTQ: rounding of weights column by column, each error corrected on the columns to come.

Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1.

    for j = 0..D-1:   e = (W_j - s q_j) / U_jj,   q_j = round(W_j / s),   W_:,k>j -= e U_jk

U is the upper Cholesky factor of H^-1, H = 2 X X^T + lambda I; corrections beyond a block are
applied once per block. The grid is the symmetric one per output channel of `int8`, taken from the
weight before any correction; on it 0 is exact, so pruned weights stay pruned.

R rows (output channels)   D columns (inputs)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.quantization.int8 import WEIGHT_LEVELS
from goldcrest.kernels.sparsity.hessian import inverse_factor


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
    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not fit an H of {tuple(hessian.shape)}"
        )
    order = torch.arange(weight.shape[1])
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], settings.damping)
    work = weight.detach()[:, order].to(factor.upper.dtype, copy=True)
    work[:, factor.dead] = 0.0  # never seen, so its code is free: zero stores and prunes best
    keep = torch.ones_like(work, dtype=torch.bool) if mask is None else mask[:, order]
    step = scales.to(work.dtype)
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], settings.block):
        end = min(start + settings.block, work.shape[1])
        errors = torch.zeros_like(work[:, start:end])
        for column in range(start, end):
            rounded = torch.round(work[:, column] / step).clamp(-levels, levels)
            codes[:, column] = torch.where(keep[:, column], rounded, 0.0)
            error = (work[:, column] - step * codes[:, column]) / factor.upper[column, column]
            work[:, column:end] -= error[:, None] * factor.upper[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ factor.upper[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.int8)


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """0.5 tr(dW H dW^T), the squared error of the layer's output on the calibration inputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return 0.5 * float(((difference @ hessian) * difference).sum())

"""Clipping searches: a narrower range, whose smaller step is worth the weights it clips.

Sources: E. Frantar et al., "GPTQ", ICLR 2023, the authors' code (error of the weights, exponent
2.4); J. Lin et al., "AWQ", MLSys 2024, section 4 and the authors' code (error of the outputs).

Every group tries its whole range first and keeps the best: no group gets worse by its measure.

R rows   G groups   g columns of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.grid import (
    GridSettings,
    bounds,
    fake_quantize,
    parameters,
)

WEIGHT_SHARES = tuple(1 - step / 100 for step in range(80))
"""1, 0.99, .., 0.21 of both ends of the range."""

OUTPUT_SHARES = tuple(1 - step / 20 for step in range(10))
"""1, 0.95, .., 0.55 of max|w|."""

NORM = 2.4
"""Exponent of the weights' error: outliers count more than in a mean square."""


def by_weight_error(grouped: Tensor, grid: GridSettings) -> tuple[Tensor, Tensor]:
    """(low, high), (R, G) each: p times the range that gives the least sum |w^ - w|^2.4."""
    low, high = bounds(grouped)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    for share in WEIGHT_SHARES:
        scales, zero_points = parameters(low * share, high * share, grid)
        rounded = fake_quantize(grouped, scales, zero_points, grid.top)
        error = (rounded - grouped).abs().pow(NORM).sum(dim=2)
        chosen = torch.where(error < best, share, chosen)
        best = torch.minimum(best, error)
    return low * chosen, high * chosen


def by_output_error(grouped: Tensor, moments: Tensor, grid: GridSettings) -> tuple[Tensor, Tensor]:
    """(low, high), (R, G) each: the range cut at p max|w| whose outputs err least.

    The error of a group's share of the output, mean ((w^ - w) x)^2, needs only the inputs' second
    moments within the group: d M d^T. So all calibration tokens count, not a few hundred.

    Args:
        grouped: weights (R, G, g).
        moments: X X^T of each group (G, g, g), up to a factor.
        grid: bits, scheme.
    """
    low, high = bounds(grouped)
    largest = torch.maximum(high, -low)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    moments = moments.to(grouped.dtype)
    for share in OUTPUT_SHARES:
        cut = share * largest
        scales, zero_points = parameters(low.maximum(-cut), high.minimum(cut), grid)
        difference = fake_quantize(grouped, scales, zero_points, grid.top) - grouped
        error = (torch.einsum("rgi,gij->rgj", difference, moments) * difference).sum(dim=2)
        chosen = torch.where(error < best, share, chosen)
        best = torch.minimum(best, error)
    cut = chosen * largest
    return low.maximum(-cut), high.minimum(cut)


def group_moments(hessian: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks (G, g, g) of H (D, D), zeros beyond its end."""
    columns = hessian.shape[0]
    size = columns if group_size == -1 else group_size
    padded = torch.nn.functional.pad(hessian, (0, -columns % size, 0, -columns % size))
    count = padded.shape[0] // size
    return padded.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

"""GPTQ on groups: rounding column by column, each error corrected on the columns to come.

Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1 and section 4
("grouping"). The recursion is that of `quantization.gptq`.

A group's grid is taken when its first column is reached, from weights corrected up to there; with
`static_groups` from the original weights, before anything is corrected. With `act_order` columns go
by falling diag H: then a group is g columns of that order and every column stores its group, but
with static groups it is g neighbours of the original order, which stores and runs faster.

Layers that read one input share H; their rows are independent, so they go through one recursion,
stacked.

R rows (of all stacked layers)   D columns   g columns of a group
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.quantization.gptq import check_fit, column_order, recursion
from goldcrest.kernels.sparsity.hessian import inverse_factor
from goldcrest.kernels.weight_only import clipping
from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import (
    SCALE_TYPES,
    GridSettings,
    QuantizedWeight,
    bounds,
    check_weight,
    contiguous_groups,
    encode,
    group_columns,
    parameters,
)

READS: frozenset[str] = frozenset(("hessians",))
"""What the method reads of a block's calibration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of GPTQ."""

    block: int = 128  # columns corrected lazily together
    damping: float = 0.01  # lambda as a share of mean(diag H)
    act_order: bool = False  # columns of large diag H first, while there is room for corrections
    static_groups: bool = False  # grids from the original weight; with act_order, groups in order
    clip: bool = False  # shrink each group's range for least |w^ - w|^2.4, as RTN's search does
    keep_zeros: bool = False  # zeros of the incoming weight stay zero (pruned weights)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1 column, not {self.block}")
        if self.damping < 0:
            raise ValueError(f"damping must be at least 0, not {self.damping}")


def quantize(
    block: Block, *, grid: GridSettings, settings: Settings, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Quantize the weights of a block by the H of their inputs; `seed` is not used.

    H is the one given: to see inputs made by the layers quantized before, in one transformer
    block, give those layers as a block of their own and calibrate anew.

    Raises ValueError for weights that do not divide into groups or are not finite, and for an H
    that does not fit or is not finite.
    """
    quantized = {}
    for names in block.sets:
        for name in names:
            check_weight(block.weights[name], grid)
        weights = [block.weights[name] for name in names]
        stacked = quantize_weight(torch.cat(weights), block.hessians[names[0]], grid, settings)
        first = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(first, first + len(weight))
            quantized[name] = QuantizedWeight(
                codes=stacked.codes[rows],
                scales=stacked.scales[rows],
                zero_points=stacked.zero_points[rows],
                bits=stacked.bits,
                group_size=stacked.group_size,
                groups=stacked.groups,
            )
            first = rows.stop
    return {name: quantized[name] for name in block.weights}


def quantize_weight(
    weight: Tensor, hessian: Tensor, grid: GridSettings, settings: Settings
) -> QuantizedWeight:
    """Quantize one weight (R, D) with H = 2 X X^T (D, D), whose precision is computed in."""
    check_weight(weight, grid)
    check_fit(weight, hessian)
    order = column_order(hessian, act_order=settings.act_order)
    maker = _Grids(weight, order, grid, settings)
    codes = recursion(
        weight,
        hessian,
        maker.round_column,
        order=order,
        block=settings.block,
        damping=settings.damping,
        group=1 if settings.static_groups else maker.size,
    )
    in_order = settings.static_groups or not settings.act_order
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=maker.scales.to(SCALE_TYPES[grid.scale_dtype]),
        zero_points=maker.zero_points.to(torch.uint8),
        bits=grid.bits,
        group_size=grid.group_size,
        groups=None if in_order else maker.groups.to(torch.int32),
    )


def quantize_weight_reference(
    weight: Tensor, hessian: Tensor, grid: GridSettings, settings: Settings
) -> Tensor:
    """`quantize_weight` decoded (R, D), for tests: O(D^4), without order, clipping or kept zeros.

    Every column's correction is the surgeon's, -e [H^-1]_j,: / [H^-1]_jj, with the inverse of what
    is left of H made anew, and reaches all columns at once: there are no blocks.
    """
    factor = inverse_factor(hessian, settings.damping)
    work = weight.to(hessian.dtype, copy=True)
    work[:, factor.dead] = 0.0
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    for column in range(weight.shape[1]):
        if column % size == 0:
            group = (work if not settings.static_groups else weight)[:, column : column + size]
            scales, zero_points = parameters(*bounds(group.float()[:, None]), grid)
            scales, zero_points = scales.to(work.dtype), zero_points.to(work.dtype)
        codes = (work[:, column, None] / scales).round() + zero_points
        error = work[:, column, None] - scales * (codes.clamp(0, grid.top) - zero_points)
        inverse = torch.linalg.inv(factor.damped[column:, column:])
        work[:, column:] -= error * inverse[0] / inverse[0, 0]
    return work.float()


class _Grids:
    """Makes the groups' grids as the recursion reaches them, and rounds columns on them."""

    def __init__(
        self, weight: Tensor, order: Tensor, grid: GridSettings, settings: Settings
    ) -> None:
        self.grid, self.settings, self.order = grid, settings, order
        self.keep = (weight != 0) if settings.keep_zeros else None
        rows, columns = weight.shape
        self.size = columns if grid.group_size == -1 else grid.group_size
        self.groups = contiguous_groups(columns, grid.group_size, weight.device)  # of each column
        if not settings.static_groups:
            self.groups = torch.empty_like(self.groups).scatter_(0, order, self.groups)
        # As plain numbers: the recursion asks for them column by column.
        self.columns, self.group_of = order.tolist(), self.groups.tolist()
        count = max(self.group_of) + 1
        # Float32 as they are stored: codes are chosen for the scales that will decode them.
        self.scales = torch.empty(rows, count, device=weight.device)
        self.zero_points = torch.empty_like(self.scales)

    def round_column(self, position: int, work: Tensor) -> tuple[Tensor, Tensor]:
        if self.settings.static_groups and position == 0:
            # Nothing is corrected yet: `work` is the weight itself, in the order worked in.
            self._take(work[:, self.order.argsort()], slice(None))
        elif not self.settings.static_groups and position % self.size == 0:
            group = position // self.size
            self._take(work[:, position : position + self.size], slice(group, group + 1))
        column = self.columns[position]
        group = self.group_of[column]
        scales = self.scales[:, group].to(work.dtype)
        zero_points = self.zero_points[:, group].to(work.dtype)
        weight = work[:, position, None, None]  # (R, 1, 1): groups of one column
        codes = encode(weight, scales[:, None], zero_points[:, None], self.grid.top)[:, 0, 0]
        codes = codes.to(work.dtype)
        if self.keep is not None:
            codes = torch.where(self.keep[:, column], codes, zero_points)
        return codes, scales * (codes - zero_points)

    def _take(self, columns: Tensor, groups: slice) -> None:
        """Grids of `groups` from their columns (R, groups x g)."""
        grouped = group_columns(columns.float(), self.size)
        if self.settings.clip:
            low, high = clipping.by_weight_error(grouped, self.grid)
        else:
            low, high = bounds(grouped)
        scales, zero_points = parameters(low, high, self.grid)
        self.scales[:, groups], self.zero_points[:, groups] = scales, zero_points

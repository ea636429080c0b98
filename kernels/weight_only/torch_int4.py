"""Products with packed 4-bit codes by torch's own CPU operator: weights are never decoded whole.

Source: the operators `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu` of
torch, which compute w = s (q - 8) + o with o = s (8 - z), in groups of 32, 64, 128 or 256 columns
and rows by sixteens. Their packed form differs from machine to machine, so it is made at loading
and never stored.

What does not fit is brought into that form: larger groups become several of 256 with one scale,
rows are filled up with sixteens, and columns of act-order are put in the order of their groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from goldcrest.kernels.weight_only.grid import QuantizedWeight

GROUP_SIZES = (256, 128, 64, 32)
"""What the operator knows, largest first."""

ROWS = 16
"""Outputs come in multiples of this."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the operator's form."""

    codes: Tensor  # opaque
    scales_and_offsets: Tensor  # (groups, rows, 2) in the precision of the inputs
    group_size: int  # of the operator
    rows: int  # outputs without the filling
    order: Tensor | None  # (D,) order of the input's columns
    input_scales: Tensor | None  # t (D,)


def fits(weight: QuantizedWeight) -> bool:
    """Whether the operator can run this weight: 4 bits, groups in multiples of 32 columns."""
    return weight.bits == 4 and _group_size(weight) is not None


def prepare(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Pack for inputs of `dtype` (float32, bfloat16 or float16), which scales are rounded to.

    Raises ValueError for a weight that does not fit.
    """
    size = _group_size(weight)
    if weight.bits != 4 or size is None:
        raise ValueError(
            f"torch's int4 product takes 4 bits and groups in multiples of 32 columns, not "
            f"{weight.bits} bits and groups of {weight.group_size} in {weight.codes.shape[1]}"
        )
    order = None if weight.groups is None else weight.column_groups().argsort(stable=True)
    codes = weight.codes if order is None else weight.codes[:, order]
    rows, columns = codes.shape
    filling = (0, 0, 0, -rows % ROWS)
    scales = weight.scales.float()
    both = torch.stack([scales, scales * (8 - weight.zero_points.float())], dim=2)
    both = both.repeat_interleave(columns // size // scales.shape[1], dim=1)
    both = F.pad(both, (0, 0, *filling))
    return PackedWeight(
        codes=torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            F.pad(codes.int(), filling).contiguous(), 2
        ),
        scales_and_offsets=both.transpose(0, 1).to(dtype).contiguous(),
        group_size=size,
        rows=rows,
        order=order,
        input_scales=weight.input_scales,
    )


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """(N, D) x packed weight^T: (N, R) in the precision of `x`, the one packed for."""
    if weight.input_scales is not None:
        x = x / weight.input_scales.to(x.dtype)
    if weight.order is not None:
        x = x[:, weight.order]
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.codes, weight.group_size, weight.scales_and_offsets
    )
    return result[:, : weight.rows]


def _group_size(weight: QuantizedWeight) -> int | None:
    """The operator's largest group size that divides the weight's; None if there is none."""
    counts = torch.bincount(weight.column_groups(), minlength=weight.scales.shape[1])
    own = int(counts[0])
    if bool((counts != own).any()):  # a shorter last group
        return None
    return next((size for size in GROUP_SIZES if own % size == 0), None)

"""Storage as AutoAWQ writes it ("gemm" version), 4 bits.

Source: the AutoAWQ project, `WQLinear_GEMM`.

    qweight  (D, R / 8) int32   codes of an input along the outputs
    qzeros   (G, R / 8) int32   zero points of a group along the outputs
    scales   (G, R) float16

Within a word outputs stand in the order 0 2 4 6 1 3 5 7, low nibble first: a runtime's unpacking of
even and odd nibbles then yields neighbours.

R outputs   D inputs   G groups, contiguous and of equal size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.gptq_layout import half_scales
from goldcrest.kernels.weight_only.grid import QuantizedWeight
from goldcrest.kernels.weight_only.packing import pack_codes, unpack_codes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 outputs stands in each nibble of a word, from the lowest."""


def to_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight, qzeros, scales of a weight. Scales are rounded to float16, as the format has them.

    Raises ValueError for other bits than 4, outputs that do not fill words, groups out of order or
    of unequal size, input scales that are not folded, and scales beyond float16.
    """
    rows, columns = weight.codes.shape
    if weight.bits != 4:
        raise ValueError(f"the AWQ layout has 4 bits, not {weight.bits}")
    if rows % 8:
        raise ValueError(f"the AWQ layout takes outputs by eights, not {rows}")
    groups = weight.scales.shape[1]
    if weight.groups is not None or (groups > 1 and columns != groups * weight.group_size):
        raise ValueError("the AWQ layout takes groups of neighbours, all of one size")
    if weight.input_scales is not None:
        raise ValueError("the AWQ layout has no input scales; fold them into the layer before")
    return {
        "qweight": _words(weight.codes.t()),
        "qzeros": _words(weight.zero_points.t()),
        "scales": half_scales(weight.scales).t().contiguous(),
    }


def from_awq(tensors: Mapping[str, Tensor], group_size: int) -> QuantizedWeight:
    """The weight of a checkpoint's tensors; `group_size` (-1: per channel) is in its config.

    Raises ValueError for tensors that do not belong together.
    """
    missing = [part for part in ("qweight", "qzeros", "scales") if part not in tensors]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    codes = _codes(tensors["qweight"]).t().contiguous()
    zero_points = _codes(tensors["qzeros"]).t().contiguous()
    rows, columns = codes.shape
    shape = (rows, 1 if group_size == -1 else columns // group_size)
    scales = tensors["scales"].t().contiguous()
    if tuple(scales.shape) != shape or tuple(zero_points.shape) != shape:
        raise ValueError(
            f"scales {tuple(scales.shape)} and zero points {tuple(zero_points.shape)} of "
            f"{rows} x {columns} codes are not {shape}"
        )
    return QuantizedWeight(
        codes=codes, scales=scales, zero_points=zero_points, bits=4, group_size=group_size
    )


def _words(codes: Tensor) -> Tensor:
    """(n, R) codes as (n, R / 8) int32."""
    ordered = codes.unflatten(1, (-1, 8))[:, :, list(ORDER)].flatten(1)
    return pack_codes(ordered, 4).view(torch.int32)


def _codes(words: Tensor) -> Tensor:
    """(n, R / 8) int32 as (n, R) codes uint8."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise ValueError(f"words must be (n, R / 8) int32, not {tuple(words.shape)} {words.dtype}")
    ordered = unpack_codes(words.contiguous().view(torch.uint8), 4, words.shape[1] * 8)
    nibbles = ordered.unflatten(1, (-1, 8))
    codes = torch.empty_like(nibbles)
    codes[:, :, list(ORDER)] = nibbles
    return codes.flatten(1)

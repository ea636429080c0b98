"""Storage as AutoGPTQ and GPTQModel write it, which most runtimes for quantized models read.

Source: the AutoGPTQ project, `qlinear` modules and `quantize_config.json` (checkpoint formats
"gptq" and "gptq_v2").

    qweight  (D b / 32, R) int32   codes of an output along its inputs, least significant first
    qzeros   (G, R b / 32) int32   zero points of a group along the outputs; "gptq" stores z - 1
    scales   (G, R) float16
    g_idx    (D,) int32            group of each column

So qweight is `packing`'s bit stream of a row, read as little-endian words, and transposed; that
holds for 3 bits too, whose codes cross words. z - 1 cannot hold z = 0: writers let it wrap and
some readers do not undo that, so "gptq" refuses such a group here and "gptq_v2" takes it.

R outputs   D inputs   G groups   b bits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.grid import QuantizedWeight, contiguous_groups
from goldcrest.kernels.weight_only.packing import is_contiguous, pack_codes, unpack_codes

Format = Literal["gptq", "gptq_v2"]
"""Checkpoint formats; they differ in how zero points are stored."""

BITS = (2, 3, 4, 8)
"""Bits that the format knows."""


def to_gptq(weight: QuantizedWeight, form: Format = "gptq") -> dict[str, Tensor]:
    """qweight, qzeros, scales, g_idx of a weight. Scales are rounded to float16, as it is stored.

    Raises ValueError for bits that the format does not know, sizes whose codes do not fill words,
    input scales that are not folded, scales beyond float16, and zero points of 0 in "gptq".
    """
    offset = _offset(form)
    rows, columns = weight.codes.shape
    check_size(weight.bits, rows, columns)
    if weight.input_scales is not None:
        raise ValueError("the GPTQ layout has no input scales; fold them into the layer before")
    if offset and bool((weight.zero_points == 0).any()):
        raise ValueError(
            'a group with hardly a negative weight has zero point 0, which the format "gptq" '
            'cannot hold; write "gptq_v2", or quantize with a symmetric scheme'
        )
    return {
        "qweight": _words(weight.codes, weight.bits).t().contiguous(),
        "qzeros": _words((weight.zero_points - offset).t(), weight.bits),
        "scales": half_scales(weight.scales).t().contiguous(),
        "g_idx": weight.column_groups().to(torch.int32),
    }


def from_gptq(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, form: Format = "gptq"
) -> QuantizedWeight:
    """The weight of a checkpoint's tensors; `bits` and `group_size` are in its config.

    A missing g_idx means groups in order. Raises ValueError for tensors that do not belong
    together. In "gptq" a stored 2^b - 1 is read as zero point 0, undoing the wrap of writers.
    """
    offset = _offset(form)
    missing = [part for part in ("qweight", "qzeros", "scales") if part not in tensors]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    qweight, qzeros, scales = (tensors[part] for part in ("qweight", "qzeros", "scales"))
    if bits not in BITS or qweight.ndim != 2 or scales.ndim != 2:
        raise ValueError(f"{bits} bits with {qweight.ndim} dimensions are no GPTQ weight")
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    check_size(bits, rows, columns)
    groups = -(-columns // (columns if group_size == -1 else group_size))
    if tuple(scales.shape) != (groups, rows) or qzeros.shape[0] != groups:
        raise ValueError(
            f"scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not fit {groups} "
            f"groups of {rows} outputs"
        )
    g_idx = tensors.get("g_idx", contiguous_groups(columns, group_size, qweight.device))
    if tuple(g_idx.shape) != (columns,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"g_idx must give {columns} columns one of {groups} groups")
    zero_points = (_codes(qzeros, bits, rows).t() + offset) & (2**bits - 1)
    return QuantizedWeight(
        codes=_codes(qweight.t(), bits, columns),
        scales=scales.t().contiguous(),
        zero_points=zero_points.contiguous(),
        bits=bits,
        group_size=group_size,
        groups=None if is_contiguous(g_idx, group_size) else g_idx.to(torch.int32),
    )


def quantization_config(
    weights: Sequence[QuantizedWeight], form: Format = "gptq"
) -> dict[str, object]:
    """What a model's config must say of its GPTQ weights (read back wrongly without it).

    Raises ValueError if they do not share bits and group size.
    """
    sizes = {(weight.bits, weight.group_size) for weight in weights}
    if len(sizes) != 1:
        raise ValueError(f"weights must share bits and group size, not {sorted(sizes)}")
    bits, group_size = sizes.pop()
    return {
        "quant_method": "gptq",
        "checkpoint_format": form,
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(weight.groups is not None for weight in weights),
        "sym": all(is_symmetric(weight) for weight in weights),
    }


def is_symmetric(weight: QuantizedWeight) -> bool:
    """Whether every group's zero point is in the middle of the codes, 2^(b - 1)."""
    return bool((weight.zero_points == 2 ** (weight.bits - 1)).all())


def half_scales(scales: Tensor) -> Tensor:
    """Scales in float16. Raises ValueError where that makes them infinite or 0."""
    half = scales.half()
    if not bool(torch.isfinite(half).all()) or bool((half == 0).any()):
        raise ValueError("scales are beyond what float16 holds; quantize with that scale_dtype")
    return half


def _offset(form: Format) -> int:
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f'the format must be "gptq" or "gptq_v2", not "{form}"')
    return 1 if form == "gptq" else 0


def check_size(bits: int, rows: int, columns: int) -> None:
    """Raise ValueError for bits that the format does not know and codes that fill no words."""
    if bits not in BITS:
        raise ValueError(f"the GPTQ layout knows 2, 3, 4 and 8 bits, not {bits}")
    if rows * bits % 32 or columns * bits % 32:
        raise ValueError(
            f"{rows} x {columns} codes of {bits} bits do not fill words of 32 bits both ways"
        )


def _words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as int32 words."""
    return pack_codes(codes, bits).view(torch.int32)


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows of int32 words as `count` codes uint8."""
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, not {words.dtype}")
    return unpack_codes(words.contiguous().view(torch.uint8), bits, count)

"""Integer grids for groups of weights: codes, a scale and a zero point per group.

Sources: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2 (groups,
schemes); W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", EMNLP Findings 2024, equations (1)-(4) (rounding with an offset and bounds
that are trained).

Every scheme is stored in one form, unsigned codes q in 0..2^b - 1 and a zero point z per group:

    w ~ s (q - z)        q = clamp(round(w / s + v) + z, 0, 2^b - 1)        v = 0 but where trained

    asym      s = (high - low) / (2^b - 1)        z = round(-low / s)      low <= 0 <= high
    sym       s = max|w| / (2^(b-1) - 1)          z = 2^(b-1)              the lowest code unused
    sym_full  s = -extreme / 2^(b-1)              z = 2^(b-1)              s may be negative
    sym_gptq  s = 2 max|w| / (2^b - 1)            z = 2^(b-1)              max|w| half a step out

`extreme` is the group's entry of largest magnitude, with its sign: the side that reaches farther
gets the code that the other side lacks. 0 is exact on every grid, so pruned weights stay pruned.

R rows (outputs)   D columns (inputs)   G groups   g columns of a group   b bits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Scheme = Literal["asym", "sym", "sym_full", "sym_gptq"]
"""How a group's range becomes a scale and a zero point."""

SCALE_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """The grid that a weight is put on, whatever the method that chooses the codes."""

    bits: int = 4  # b
    group_size: int = 32  # g, columns that share a scale; -1: the whole row (per channel)
    scheme: Scheme = "asym"
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # codes are chosen for it
    ragged: bool = False  # the last group of a row may be shorter than group_size

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size must be at least 1 column, or -1 for whole rows, not {self.group_size}"
            )
        if self.scheme not in ("asym", "sym", "sym_full", "sym_gptq"):
            raise ValueError(f"scheme must be asym, sym, sym_full or sym_gptq, not '{self.scheme}'")
        if self.scale_dtype not in SCALE_TYPES:
            raise ValueError(
                f"scale_dtype must be one of {', '.join(SCALE_TYPES)}, not '{self.scale_dtype}'"
            )

    @property
    def top(self) -> int:
        """The largest code, 2^b - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """2^(b-1), the zero point of symmetric grids."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight as codes: the layer computes (x / t) [s (q - z)]^T."""

    codes: Tensor  # q (R, D) uint8
    scales: Tensor  # s (R, G) in the precision it is stored in
    zero_points: Tensor  # z (R, G) uint8
    bits: int
    group_size: int  # as asked for, -1 included
    groups: Tensor | None = None  # (D,) int32 group of each column; None: g after g, in order
    input_scales: Tensor | None = None  # t (D,) float32; None: ones, or folded away

    def column_groups(self) -> Tensor:
        """Group of each column (D,) int64."""
        if self.groups is not None:
            return self.groups.long()
        return contiguous_groups(self.codes.shape[1], self.group_size, self.codes.device)

    def decode(self) -> Tensor:
        """s (q - z) (R, D) float32: what x / t is multiplied with."""
        return decode(self.codes, self.scales, self.zero_points, self.column_groups())

    def effective(self) -> Tensor:
        """s (q - z) / t (R, D) float32: what stands in for the original weight."""
        weight = self.decode()
        return weight if self.input_scales is None else weight / self.input_scales


# --- groups -------------------------------------------------------------------------------------


def check_weight(weight: Tensor, grid: GridSettings) -> None:
    """Raise ValueError for a weight that cannot be put on the grid, saying what would help."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight must be (rows, columns), not {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinite values")
    columns, size = weight.shape[1], grid.group_size
    if size > 0 and columns % size and not grid.ragged:
        fits = [g for g in (16, 32, 64, 128, 256, 512, 1024) if columns % g == 0 and g < size]
        smaller = f"group_size {fits[-1]}, " if fits else ""
        raise ValueError(
            f"{columns} input channels do not divide into groups of {size}; take {smaller}"
            "-1 (a group per row), or ragged groups (the last one shorter)"
        )


def contiguous_groups(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group of each column (D,) int64 where groups follow each other."""
    size = columns if group_size == -1 else group_size
    return torch.arange(columns, device=device) // size


def group_columns(weight: Tensor, group_size: int) -> Tensor:
    """(R, D) as (R, G, g); zeros fill the last group, which every grid holds exactly."""
    size = weight.shape[1] if group_size == -1 else group_size
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def ungroup_columns(grouped: Tensor, columns: int) -> Tensor:
    """(R, G, g) as (R, D) again."""
    return grouped.flatten(1)[:, :columns]


def bounds(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) of groups (R, G, g), each (R, G): their ranges, widened to hold 0."""
    return grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)


# --- grids --------------------------------------------------------------------------------------


def parameters(low: Tensor, high: Tensor, grid: GridSettings) -> tuple[Tensor, Tensor]:
    """Scales and zero points (whole numbers), both float, of ranges [low, high] of any shape.

    Differentiable, rounding counted as the identity. A range of nothing gets s = 1 and the middle
    zero point. Scales have values that `grid.scale_dtype` holds, in the precision of `low`.

    Raises ValueError if a scale overflows that precision.
    """
    if grid.scheme == "asym":
        scales = (high - low) / grid.top
    else:
        largest = torch.maximum(high, -low)
        if grid.scheme == "sym":
            scales = largest / (grid.middle - 1)
        elif grid.scheme == "sym_gptq":
            scales = 2 * largest / grid.top
        else:
            scales = torch.where(-low > high, largest, -largest) / grid.middle
    stored = scales.to(SCALE_TYPES[grid.scale_dtype]).to(scales.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"weights are too large for scales in {grid.scale_dtype}")
    scales = scales + (stored - scales).detach()
    # Nothing there, or so little that its scale is 0 as stored: any grid will do, but not s = 0.
    empty = stored == 0
    scales = torch.where(empty, torch.ones_like(scales), scales)
    middle = torch.full_like(scales, grid.middle)
    if grid.scheme != "asym":
        return scales, middle
    zero_points = round_through(-low / scales).clamp(0, grid.top)
    return scales, torch.where(empty, middle, zero_points)


def round_through(x: Tensor) -> Tensor:
    """round(x), halves to even, with the gradient of x (straight-through)."""
    # x + (round(x) - x) is exact: the difference of neighbours is, and so is the sum.
    return x + (torch.round(x) - x).detach()


def fake_quantize(
    grouped: Tensor, scales: Tensor, zero_points: Tensor, top: int, offset: Tensor | float = 0.0
) -> Tensor:
    """Groups (R, G, g) moved to their grids, (R, G) each; differentiable in every argument.

    `offset` is added to w / s before rounding. Within the range the gradient of w is 1.
    """
    scales, zero_points = scales[..., None], zero_points[..., None]
    codes = (round_through(grouped / scales + offset) + zero_points).clamp(0, top)
    return scales * (codes - zero_points)


def encode(
    grouped: Tensor, scales: Tensor, zero_points: Tensor, top: int, offset: Tensor | float = 0.0
) -> Tensor:
    """Codes of groups (R, G, g), uint8; `fake_quantize` before it is decoded."""
    codes = torch.round(grouped / scales[..., None] + offset) + zero_points[..., None]
    return codes.clamp(0, top).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, zero_points: Tensor, groups: Tensor) -> Tensor:
    """s (q - z) (R, D) float32 of codes (R, D), each column on the grid of its group (D,)."""
    steps, zeros = scales.float()[:, groups], zero_points.float()[:, groups]
    return steps * (codes.float() - zeros)


def round_to_grid(
    weight: Tensor,
    grid: GridSettings,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
    offset: Tensor | float = 0.0,
    input_scales: Tensor | None = None,
) -> QuantizedWeight:
    """Round every weight (R, D) to the nearest point of its group's grid.

    Args:
        weight: (R, D) float, already multiplied with `input_scales` where there are any.
        grid: bits, groups, scheme.
        low, high: (R, G) ranges to cover instead of the groups' own; weights beyond are clipped.
        offset: (R, G, g), added before rounding, in steps.
        input_scales: t (D,), kept beside the codes.

    Raises:
        ValueError: a weight that `check_weight` refuses.
    """
    check_weight(weight, grid)
    with torch.no_grad():
        grouped = group_columns(weight.float(), grid.group_size)
        own_low, own_high = bounds(grouped)
        scales, zero_points = parameters(
            own_low if low is None else low, own_high if high is None else high, grid
        )
        codes = encode(grouped, scales, zero_points, grid.top, offset)
    return QuantizedWeight(
        codes=ungroup_columns(codes, weight.shape[1]).contiguous(),
        scales=scales.to(SCALE_TYPES[grid.scale_dtype]),
        zero_points=zero_points.to(torch.uint8),
        bits=grid.bits,
        group_size=grid.group_size,
        input_scales=input_scales,
    )


def round_to_grid_reference(weight: Tensor, grid: GridSettings) -> Tensor:
    """`round_to_grid` decoded, (R, D) float32: one weight after another by trying every code."""
    result = torch.empty(weight.shape)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].float()
            low, high = group.amin().clamp(max=0), group.amax().clamp(min=0)
            scale, zero = parameters(low, high, grid)
            points = scale * (torch.arange(grid.top + 1) - zero)
            nearest = (group[:, None] - points).abs().argmin(dim=1)
            result[row, start : start + size] = points[nearest]
    return result

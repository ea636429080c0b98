"""Integer grids: symmetric per output channel for weights, asymmetric per tensor for activations.

Sources: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, equations (1)-(4); E. Kurtic et al., "Sparse
Fine-Tuning for Inference Acceleration of Large Language Models", arXiv 2310.06927, section 3.4.

    weights       w ~ s_w q,  s_w = max|w| / 127 per output channel, q in -127..127; 0 is exact
    activations   x ~ s_x (q - z),  s_x = (max - min) / (2^b - 1), q in 0..2^b - 1; 0 is exact
    product       y_o = s_x s_w,o (sum_k q_x q_w - z sum_k q_w)

Activations default to 7 bits. On processors without VNNI the 8-bit multiply-add sums pairs of
u8 x s8 products in 16 bits, and 2 * 255 * 127 saturates there; 2 * 127 * 127 does not. With 7 bits
the integer result is exact, hence the same, on every machine.

R output channels   D inputs   N tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_LEVELS = 127
"""Largest code of a weight: -128 is not used, so that the grid is symmetric."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An asymmetric grid for activations: x ~ scale (q - zero_point)."""

    scale: float  # s_x, in units of the activation
    zero_point: int  # z, the code of 0
    bits: int = 7  # b, codes 0..2^b - 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation bits must be 2 to 8, not {self.bits}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, not {self.scale}")
        if not 0 <= self.zero_point <= self.top:
            raise ValueError(f"zero_point must be a code 0..{self.top}, not {self.zero_point}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1


def grid_of_range(low: float, high: float, bits: int = 7) -> Grid:
    """The grid that covers [low, high] widened to include 0; a range of nothing gets scale 1.

    Raises ValueError for bounds that are not finite.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"activations must be finite, calibration saw [{low}, {high}]")
    top = 2**bits - 1
    scale = (high - low) / top
    if scale < 1e-30:
        return Grid(scale=1.0, zero_point=0, bits=bits)
    return Grid(scale=scale, zero_point=min(top, max(0, round(-low / scale))), bits=bits)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 of `x`, any shape: clamp(round(x / s) + z), halves to even."""
    codes = torch.round(x / grid.scale) + grid.zero_point
    return codes.clamp(0, grid.top).to(torch.uint8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """s (q - z), float32."""
    return (codes.float() - grid.zero_point) * grid.scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """`x` moved to the nearest point of the grid, as float32."""
    return dequantize(quantize(x, grid), grid)


def quantize_rows(x: Tensor, bits: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic quantization: a grid of its own for every row (token) of (N, D).

    Returns codes (N, D) uint8, scales (N, 1) float32 and zero points (N, 1) float32:
    x ~ scales * (codes - zero_points).
    """
    top = 2**bits - 1
    low = x.amin(dim=1, keepdim=True).clamp(max=0)
    high = x.amax(dim=1, keepdim=True).clamp(min=0)
    scales = (high - low) / top
    scales = torch.where(scales < 1e-30, torch.ones_like(scales), scales)
    zero_points = torch.round(-low / scales).clamp(0, top)
    codes = (torch.round(x / scales) + zero_points).clamp(0, top).to(torch.uint8)
    return codes, scales, zero_points


def weight_scales(weight: Tensor) -> Tensor:
    """s_w (R,) of a weight (R, ...): max|w| / 127 per output channel, 1 for a channel of zeros."""
    largest = weight.detach().reshape(weight.shape[0], -1).abs().amax(dim=1)
    return torch.where(largest > 0, largest / WEIGHT_LEVELS, torch.ones_like(largest))


def quantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Round to nearest (RTN): codes int8 in the shape of `weight` (R, ...). Zeros stay zeros."""
    codes = torch.round(weight.detach() / _by_row(scales, weight))
    return codes.clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS).to(torch.int8)


def dequantize_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """s_w q in the shape of `codes` (R, ...), float32."""
    return codes.float() * _by_row(scales, codes).float()


def linear(codes: Tensor, grid: Grid, weight: Tensor, scales: Tensor) -> Tensor:
    """Product of activation codes (N, D) uint8 and weight codes (R, D) int8: (N, R) float32.

    The products are summed as integers by oneDNN; scales are applied to the sums. Exact for grids
    of at most 7 bits on any processor.
    """
    rows = weight.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), list(codes.shape))
    zeros = torch.zeros(rows, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes.contiguous(), grid.scale, grid.zero_point, packed, scales.float(), zeros, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def linear_reference(codes: Tensor, grid: Grid, weight: Tensor, scales: Tensor) -> Tensor:
    """`linear` with the sums in int64."""
    sums = (codes.long() - grid.zero_point) @ weight.long().t()
    return (sums.double() * grid.scale * scales.double()).float()


def _by_row(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.reshape(-1, *[1] * (weight.ndim - 1))

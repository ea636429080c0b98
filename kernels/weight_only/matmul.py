"""Products of activations with a quantized weight: float x codes and integers x codes.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 3.

    float     y_o = sum_G s_oG (sum_k x_k q_ok - z_oG sum_k x_k)
    integer   x ~ s_xG (p - z_xG), per token and group; then with u_oG = sum_k q_ok stored,
              y_o = sum_G s_xG s_oG (sum_k p_k q_ok - z_oG sum_k p_k - z_xG u_oG + g z_xG z_oG)

The sums over k run within group G, so the codes are multiplied as they are and scales meet only
the sums. Both equal the product with the decoded weight, the integer one with decoded inputs too.

These are the mathematics, for tests and for kernels to be written against. Two products run on
packed codes: `torch_int4`, torch's own operator, and `tiled` here, which decodes some rows at a
time (the "prologue" of the source) and never holds more of the float weight than that.

N tokens   R outputs   D inputs   G groups   g columns of a group
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from goldcrest.kernels.quantization.int8 import quantize_rows
from goldcrest.kernels.weight_only.grid import QuantizedWeight, contiguous_groups, decode
from goldcrest.kernels.weight_only.packing import unpack_codes

TILE = 2**18
"""Weights decoded at a time: 1 MiB of float32, which a core's own cache holds."""


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """A weight's codes group after group, as the products want them.

    A last group that is shorter is filled up with codes equal to its zero point, weights of 0.
    """

    order: Tensor  # (G g,) column of each place, D for a filled one
    codes: Tensor  # q (G, R, g) float32
    scales: Tensor  # s (G, R)
    zero_points: Tensor  # z (G, R)
    sums: Tensor  # u (G, R), the sum of each group's codes
    input_scales: Tensor | None  # t (D,)

    def inputs(self, x: Tensor) -> Tensor:
        """x (N, D) over t, in the order of the codes: (N, G, g)."""
        if self.input_scales is not None:
            x = x / self.input_scales
        return F.pad(x, (0, 1))[:, self.order].unflatten(1, (self.codes.shape[0], -1))


def by_group(weight: QuantizedWeight) -> Grouped:
    """Bring a weight's codes in the order of their groups (those of act-order lie apart)."""
    groups = weight.column_groups()
    counts = torch.bincount(groups, minlength=weight.scales.shape[1])
    columns = groups.argsort(stable=True)
    places = torch.arange(int(counts.max()), device=groups.device) < counts[:, None]
    order = torch.full_like(places, len(groups), dtype=torch.int64)
    order[places] = columns
    zero_points = weight.zero_points.float().t()
    padded = F.pad(weight.codes.float(), (0, 1))
    codes = padded[:, order].permute(1, 0, 2)
    codes = torch.where(places[:, None, :], codes, zero_points[:, :, None])
    return Grouped(
        order=order.flatten(),
        codes=codes,
        scales=weight.scales.float().t(),
        zero_points=zero_points,
        sums=codes.sum(dim=2),
        input_scales=weight.input_scales,
    )


def matmul_reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """(N, D) float x decoded weight^T: (N, R). What every other product must equal."""
    if weight.input_scales is not None:
        x = x / weight.input_scales
    return x @ weight.decode().t().to(x.dtype)


def matmul(x: Tensor, weight: Grouped) -> Tensor:
    """(N, D) float32 x codes: (N, R), scales applied to the sums of each group."""
    groups = weight.inputs(x)
    result = x.new_zeros(len(x), weight.codes.shape[1])
    for index, codes in enumerate(weight.codes):
        inputs = groups[:, index]
        products = inputs @ codes.t() - inputs.sum(dim=1)[:, None] * weight.zero_points[index]
        result += products * weight.scales[index]
    return result


@dataclass(frozen=True, kw_only=True)
class PackedCodes:
    """A weight as it is stored (see `packing`), apart from the input scales."""

    codes: Tensor  # (R, ceil(D b / 8)) uint8
    scales: Tensor  # s (R, G)
    zero_points: Tensor | None  # z (R, G) uint8; None: 2^(b-1)
    groups: Tensor | None  # (D,) int32; None: g after g
    bits: int
    columns: int  # D
    group_size: int

    def rows(self, rows: slice) -> Tensor:
        """Some rows of s (q - z) (r, D) float32."""
        packed, scales = self.codes[rows], self.scales[rows].float()
        if self.bits == 4 and self.columns % 2 == 0:  # two codes a byte: no bit stream to undo
            codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        else:
            codes = unpack_codes(packed, self.bits, self.columns)
        if self.zero_points is None:
            zero_points = torch.full_like(scales, 2 ** (self.bits - 1))
        else:
            zero_points = self.zero_points[rows].float()
        count = scales.shape[1]
        equal = self.group_size == -1 or self.columns == count * self.group_size
        if self.groups is not None or not equal:
            groups = self.groups
            if groups is None:
                groups = contiguous_groups(self.columns, self.group_size, scales.device)
            return decode(codes, scales, zero_points, groups.long())
        weight = codes.unflatten(1, (count, -1)).float()
        return weight.sub_(zero_points[..., None]).mul_(scales[..., None]).flatten(1)


def tiled(x: Tensor, weight: PackedCodes) -> Tensor:
    """(N, D) float x packed weight^T: (N, R), in the precision of x. Differentiable in x."""
    rows = max(1, TILE // weight.columns)
    parts = [
        x @ weight.rows(slice(start, start + rows)).to(x.dtype).t()
        for start in range(0, len(weight.codes), rows)
    ]
    return torch.cat(parts, dim=1)


def int8_matmul(x: Tensor, weight: Grouped, bits: int = 8) -> Tensor:
    """(N, D) float32, quantized to `bits` per token and group, x codes: (N, R) float32.

    The sums of products are whole numbers below 2^24 for groups of up to 4,096 columns of 4-bit
    codes and 8-bit inputs, so float32 holds them exactly.
    """
    groups = weight.inputs(x)
    result = x.new_zeros(len(x), weight.codes.shape[1], dtype=torch.float64)
    size = groups.shape[2]
    for index, codes in enumerate(weight.codes):
        inputs, steps, zeros = quantize_rows(groups[:, index], bits)
        inputs, z = inputs.float(), weight.zero_points[index]
        whole = (
            inputs @ codes.t()
            - inputs.sum(dim=1, keepdim=True) * z
            - zeros * weight.sums[index]
            + size * zeros * z
        )
        result += whole.double() * (steps.double() * weight.scales[index].double())
    return result.float()


def int8_matmul_reference(x: Tensor, weight: Grouped, bits: int = 8) -> Tensor:
    """`int8_matmul` by the product of decoded inputs and decoded weights, float64."""
    groups = weight.inputs(x)
    inputs, steps, zeros = quantize_rows(groups.flatten(0, 1), bits)
    decoded = (steps.double() * (inputs.double() - zeros.double())).reshape(groups.shape)
    weights = weight.scales[..., None].double() * (
        weight.codes.double() - weight.zero_points[..., None].double()
    )
    return torch.einsum("ngk,grk->nr", decoded, weights).float()

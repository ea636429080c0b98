"""A linear layer that multiplies 7-bit activations by int8 weights and sums in int32.

Sources: B. Jacob et al., CVPR 2018, section 2 (integer products); E. Kurtic et al., "Sparse
Fine-Tuning for Inference Acceleration of Large Language Models", arXiv 2310.06927, section 3.4
(weights symmetric per output channel, activations asymmetric per tensor).

    y_r = s_x s_w,r sum_d (q_x,d - z) q_w,rd + b_r

Static activations have one grid, from calibration. Dynamic ones have a grid per token: the codes
themselves are what is multiplied, and z moves out of the sum as z sum_d q_w,rd.

Execution: FBGEMM, which torch carries, quantizes the input, multiplies and scales in one call. On
processors without VNNI it adds pairs of u8 x s8 products in 16 bits, which 8-bit activations
saturate (255 * 127 * 512 comes out as half of itself); codes here end at 127, so pairs fit and the
sums are exact. Inputs are clamped to the calibrated range first, since FBGEMM itself clamps at 255.

Milliseconds of one layer (D x D, 1 thread, AVX2 without VNNI), float32 and the candidates:

    D     tokens  float32  FBGEMM   oneDNN   weight-only bf16   torch._int_mm
    512   1       0.044    0.031    0.115    0.026              0.17 (the product alone)
    512   64      0.40     0.23     0.30     1.1                17
    2048  1       0.53     0.13     0.71     0.31
    2048  64      7.8      3.4      3.8      12

FBGEMM's packing takes a tensor of torch's quantized types, which torch has announced to remove;
where they are gone, or on other processors, oneDNN's integer kernels take over, which need neither.

R outputs   D inputs
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.quantization.int8 import (
    Grid,
    dequantize_weight,
    linear_reference,
    quantize,
    quantize_rows,
    quantize_weight,
    weight_scales,
)

Execution = Literal["fbgemm", "onednn", "reference"]
"""Two sets of integer kernels; `reference`: the same integers in int64, slow, on any machine."""
Activations = Literal["static", "dynamic"]
"""One calibrated grid for all inputs, or one grid per token made from its own values."""

BITS = 7
"""Bits of activation codes: 0..127 cannot saturate a pair of products (see above)."""
_TOP = 2**BITS - 1


def best_execution() -> Execution:
    """The fastest execution that this build of torch carries."""
    if "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch, "_make_per_channel_quantized_tensor"
    ):
        return "fbgemm"
    return "onednn" if torch.backends.mkldnn.is_available() else "reference"


@dataclass(frozen=True)
class _Prepared:
    """What a forward pass needs, made once from the buffers."""

    execution: Execution
    packed: Any  # weights in the layout of FBGEMM or oneDNN; None under `reference`
    grid: Grid | None  # None for dynamic activations
    column_sums: Tensor  # (R,) float32, s_w,r sum_d q_w,rd, for dynamic zero points


class Int8Linear(nn.Module):
    """A linear layer on integers; buffers are what a bundle stores.

    Buffers: `weight` (R, D) int8, `scale` (R,) float32, `bias` (R,) float32 or absent, and for
    static activations `input_scale` () float32 and `input_zero_point` () int32.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, activations: Activations = "static"
    ) -> None:
        """A layer of zeros, on the default device (which may be "meta"), to load a state into."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.activations: Activations = activations
        self.execution: Execution = best_execution()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)
        if activations == "static":
            self.register_buffer("input_scale", torch.tensor(1.0))
            self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32))
        self._prepared: _Prepared | None = None

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, bias: Tensor | None, grid: Grid | None
    ) -> Int8Linear:
        """A layer of given codes (R, D) int8 with steps (R,); `grid` None is dynamic.

        Raises ValueError for a grid of more than 7 bits.
        """
        if grid is not None and grid.bits > BITS:
            raise ValueError(f"activations must have at most {BITS} bits, not {grid.bits}")
        outputs, inputs = codes.shape
        activations: Activations = "dynamic" if grid is None else "static"
        layer = cls(inputs, outputs, bias=bias is not None, activations=activations)
        layer.weight, layer.scale = codes.contiguous(), scales.detach().float()
        layer.bias = None if bias is None else bias.detach().float().clone()
        if grid is not None:
            layer.input_scale = torch.tensor(grid.scale)
            layer.input_zero_point = torch.tensor(grid.zero_point, dtype=torch.int32)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., R) in the precision of `x`."""
        if self._prepared is None or self._prepared.execution != self.execution:
            self._prepared = self._prepare()
        rows = x.reshape(-1, self.in_features).float()
        if rows.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        grid = self._prepared.grid
        y = self._dynamic(rows) if grid is None else self._static(rows, grid)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequantized(self) -> Tensor:
        """The weight (R, D) float32 that the codes stand for."""
        return dequantize_weight(self.weight, self.scale)

    def grid(self) -> Grid | None:
        """The grid of static activations; ValueError where it is none."""
        if self.activations == "dynamic":
            return None
        return Grid(scale=float(self.input_scale), zero_point=int(self.input_zero_point), bits=BITS)

    def extra_repr(self) -> str:
        """Sizes, as torch's own layers print them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activations={self.activations}"
        )

    def _static(self, rows: Tensor, grid: Grid) -> Tensor:
        if self.execution == "fbgemm":
            low = -grid.zero_point * grid.scale
            return self._fbgemm(rows.clamp(low, low + _TOP * grid.scale), grid)
        y = self._sums(quantize(rows, grid), grid)
        return y if self.bias is None else y.add_(self.bias)

    def _dynamic(self, rows: Tensor) -> Tensor:
        assert self._prepared is not None
        codes, scales, zero_points = quantize_rows(rows, BITS)
        unit = Grid(scale=1.0, zero_point=0, bits=BITS)
        by_fbgemm = self.execution == "fbgemm"
        sums = self._fbgemm(codes.float(), unit) if by_fbgemm else self._sums(codes, unit)
        y = scales * (sums - zero_points * self._prepared.column_sums)
        return y if self.bias is None else y.add_(self.bias)

    def _fbgemm(self, rows: Tensor, grid: Grid) -> Tensor:
        """Quantize on the grid, multiply, scale, add a static layer's bias."""
        assert self._prepared is not None
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = product(rows, grid.scale, grid.zero_point, self._prepared.packed)
        return y

    def _sums(self, codes: Tensor, grid: Grid) -> Tensor:
        """s_x s_w,r sum (q_x - z) q_w of codes (N, D)."""
        if self.execution == "reference":
            return linear_reference(codes, grid, self.weight, self.scale)
        assert self._prepared is not None
        zeros = torch.zeros(self.out_features, dtype=torch.int32)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, grid.scale, grid.zero_point, self._prepared.packed, self.scale, zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y

    def _prepare(self) -> _Prepared:
        grid, packed = self.grid(), None
        if self.execution == "fbgemm":
            # Dynamic activations add the bias after their own scales.
            packed = _pack(self.weight, self.scale, None if grid is None else self.bias)
        elif self.execution == "onednn":
            packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        sums = self.weight.sum(dim=1).float() * self.scale
        return _Prepared(self.execution, packed, grid, sums)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # packed weights belong to this process


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """The engine that torch packs weights for; torch's default may choose oneDNN."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _pack(codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
    zeros = torch.zeros(codes.shape[0], dtype=torch.long)
    with _engine("fbgemm"), warnings.catch_warnings():
        # See the head of this file: known, and what follows it is there already.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)


class Int8Embedding(nn.Module):
    """An embedding whose rows are int8 with a step each: `weight` (V, D) int8, `scale` (V,)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, entries: int, width: int) -> None:
        """A table of zeros, on the default device, to load a state into."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = entries, width
        self.register_buffer("weight", torch.zeros(entries, width, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(entries))

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Embedding:
        """Round a table (V, D) to nearest, a step per row."""
        table = cls(*weight.shape)
        table.scale = weight_scales(weight).float()
        table.weight = quantize_weight(weight, table.scale)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """Whole numbers of any shape -> (..., D) float32; only the rows asked for are read."""
        return F.embedding(ids, self.weight).float() * self.scale[ids][..., None]

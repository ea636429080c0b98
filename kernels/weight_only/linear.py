"""A linear layer that computes with packed codes and holds no float weight.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 3 (weights stay
packed in memory and are decoded on the fly, as little at a time as the caches like).

    y = (x / t) [s (q - z)]^T + b

Buffers carry the names of the stored layout (`packing`), so a state dict of the model is what goes
into the file, and `packing.unpack_state` reads it. Two products:

- 4 bits on a CPU: torch's int4 operator with inputs in bfloat16, which reads half a byte a weight
  where float32 reads four;
- other devices, other bits or groups, gradients to the inputs, `compute` float32: rows decoded tile
  by tile. The cost of decoding is shared by all tokens and the product is float32's own.

The number of tokens has no say: it is that of the whole batch, and an answer must not depend on who
else asked. The operator gives a token the same bits in any batch. It takes 1.5 times as long as
tiles from 512 tokens on, and less up to 128 (of 32 tokens a third; measured on one core).

The operator's packed form differs from machine to machine: it is made at the first call and never
stored. Codes read from a memory-mapped file are not touched again after that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from goldcrest.kernels.weight_only import matmul, torch_int4
from goldcrest.kernels.weight_only.grid import SCALE_TYPES, QuantizedWeight
from goldcrest.kernels.weight_only.packing import (
    PARTS,
    VERSION,
    checked_groups,
    checked_input_scales,
    pack,
    unpack,
    unpack_codes,
)

Compute = Literal["bfloat16", "float32"]
"""Precision of the inputs on a CPU; the operator is slow in float32."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Everything about a layer but its numbers: enough to make room for them."""

    rows: int  # R
    columns: int  # D
    bits: int
    group_size: int  # as asked for, -1 included
    scale_dtype: str
    parts: tuple[str, ...]  # which of zeros, groups, input_scales are stored
    bias: bool
    dtype: str  # of the float layer that this one replaces
    compute: Compute

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.columns // (self.columns if self.group_size == -1 else self.group_size))

    def empty(self) -> dict[str, Tensor]:
        """The buffers without numbers, on the meta device."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "header": ((5,), torch.int64),
            "codes": ((self.rows, -(-self.columns * self.bits // 8)), torch.uint8),
            "scales": ((self.rows, self.groups), SCALE_TYPES[self.scale_dtype]),
            "zeros": ((self.rows, -(-self.groups * self.bits // 8)), torch.uint8),
            "groups": ((self.columns,), torch.int32),
            "input_scales": ((self.columns,), torch.float32),
        }
        stored = [part for part in PARTS if part in PARTS[:3] or part in self.parts]
        made = {part: torch.empty(shapes[part][0], dtype=shapes[part][1], device="meta")
                for part in stored}  # fmt: skip
        if self.bias:
            made["bias"] = torch.empty(self.rows, dtype=_dtype(self.dtype), device="meta")
        return made


class WeightOnlyLinear(nn.Module):
    """(..., D) -> (..., R) with a quantized weight; for `nn.Linear` and GPT-2's `Conv1D`."""

    header: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None
    input_scales: Tensor | None
    bias: Tensor | None

    def __init__(self, form: Form, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.form = form
        for name in (*PARTS, "bias"):
            self.register_buffer(name, tensors.get(name))
        self._prepared: tuple[Tensor, Tensor, torch_int4.PackedWeight | None] | None = None

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        compute: Compute = "bfloat16",
    ) -> WeightOnlyLinear:
        """The layer of a quantized weight; `dtype` is that of the float layer it replaces."""
        tensors = {part: tensor.clone() for part, tensor in pack(weight).items()}
        form = Form(
            rows=weight.codes.shape[0],
            columns=weight.codes.shape[1],
            bits=weight.bits,
            group_size=weight.group_size,
            scale_dtype=_name(weight.scales.dtype),
            parts=tuple(part for part in PARTS[3:] if part in tensors),
            bias=bias is not None,
            dtype=_name(dtype),
            compute=compute,
        )
        if bias is not None:
            tensors["bias"] = bias.detach().to(dtype).clone()
        return cls(form, tensors)

    @classmethod
    def empty(cls, description: dict[str, Any]) -> WeightOnlyLinear:
        """A layer of `description()`'s form on the meta device, to load tensors into."""
        form = Form(**{**description, "parts": tuple(description["parts"])})
        return cls(form, form.empty())

    def description(self) -> dict[str, Any]:
        """The form as plain JSON."""
        return {**asdict(self.form), "parts": list(self.form.parts)}

    @property
    def weight(self) -> Tensor:
        """Shape and precision of the weight that is not there, on the meta device.

        Transformers ask some layers for the precision of their weight before they call them.
        """
        return torch.empty(
            self.form.rows, self.form.columns, dtype=_dtype(self.form.dtype), device="meta"
        )

    def quantized(self) -> QuantizedWeight:
        """The weight, codes unpacked. Raises ValueError for tensors that don't belong together."""
        parts = {part: getattr(self, part) for part in PARTS}
        return unpack({part: tensor for part, tensor in parts.items() if tensor is not None})

    def check(self) -> None:
        """Raise ValueError for loaded tensors that contradict the form; codes are not read."""
        form = self.form
        wanted = [VERSION, form.bits, form.rows, form.columns, form.group_size]
        if self.header.tolist() != wanted:
            raise ValueError(f"the header is {self.header.tolist()}, not {wanted}")
        checked_groups(self.groups, form.columns, form.groups)
        checked_input_scales(self.input_scales, form.columns)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., R) in the precision of x."""
        tokens = x.reshape(-1, self.form.columns)
        if self.input_scales is not None:
            tokens = tokens / self.input_scales.to(x.dtype)
        differentiable = torch.is_grad_enabled() and tokens.requires_grad
        prepared = None if differentiable else self._operator(x.device)
        if prepared is None:
            y = matmul.tiled(tokens, self._packed())
        else:
            y = torch_int4.matmul(tokens.bfloat16(), prepared).to(x.dtype)
        y = y.reshape(*x.shape[:-1], self.form.rows)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        form = self.form
        return f"{form.columns}, {form.rows}, bits={form.bits}, group_size={form.group_size}"

    def _operator(self, device: torch.device) -> torch_int4.PackedWeight | None:
        """The operator's form of the weight, where the operator is the product to take."""
        if self.form.compute != "bfloat16" or self.form.bits != 4 or device.type != "cpu":
            return None
        # Buffers are replaced when the module moves and when a state is assigned.
        known = self._prepared
        if known is None or known[0] is not self.codes or known[1] is not self.scales:
            weight = replace(self.quantized(), input_scales=None)
            fits = torch_int4.fits(weight)
            prepared = torch_int4.prepare(weight, torch.bfloat16) if fits else None
            known = self._prepared = (self.codes, self.scales, prepared)
        return known[2]

    def _packed(self) -> matmul.PackedCodes:
        zeros = self.zeros
        return matmul.PackedCodes(
            codes=self.codes,
            scales=self.scales,
            zero_points=None
            if zeros is None
            else unpack_codes(zeros, self.form.bits, self.form.groups),
            groups=self.groups,
            bits=self.form.bits,
            columns=self.form.columns,
            group_size=self.form.group_size,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None  # values may be copied into the buffers that it was made of
        super()._load_from_state_dict(*args, **kwargs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{name}' is not a precision")
    return dtype

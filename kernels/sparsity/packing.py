"""Storage of sparse weights: one bit per weight that says whether it is there, then the values.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language
Models", arXiv 2310.06927, section 5 (cost of compressed weights). Bytes per weight at sparsity s:
4 (1 - s) + 1/8 in float32, (1 - s) + 1/8 in int8; ideal memory-bound speed-ups over dense float32
are 4 divided by these.

Bits are packed least significant first, in row-major order; values keep their precision, so a
round trip is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A sparse tensor in storage form; both tensors go into safetensors as they are."""

    bitmask: Tensor  # (ceil(n / 8),) uint8, bit i of byte b is weight 8 b + i
    values: Tensor  # (non-zeros,) in the weight's precision, row-major
    shape: tuple[int, ...]  # the dense shape, n entries in all

    @property
    def bytes(self) -> int:
        """Bytes that bitmask and values take."""
        return self.bitmask.numel() + self.values.numel() * self.values.element_size()


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans of any shape as bytes (ceil(n / 8),) uint8, the last byte filled with zeros."""
    flat = bits.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    places = torch.arange(8, dtype=torch.uint8)
    return (padded << places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Booleans of `shape` from `pack_bits`.

    Raises ValueError if the bytes are too many or too few, or bits beyond the end are set.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(
            f"a bitmask for shape {tuple(shape)} must be {-(-count // 8)} uint8 bytes, "
            f"not {tuple(packed.shape)} of {packed.dtype}"
        )
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    flat = bits.reshape(-1).bool()
    if bool(flat[count:].any()):
        raise ValueError("a bitmask has bits set beyond its last weight: it is damaged")
    return flat[:count].reshape(tuple(shape))


def pack(weight: Tensor) -> PackedWeight:
    """Pack a tensor of any shape and precision (float32, bfloat16, int8, ...)."""
    there = weight.detach() != 0
    return PackedWeight(
        bitmask=pack_bits(there), values=weight.detach()[there], shape=tuple(weight.shape)
    )


def unpack(packed: PackedWeight) -> Tensor:
    """The dense tensor of a `PackedWeight`.

    Raises ValueError if bitmask, values and shape do not belong together.
    """
    there = unpack_bits(packed.bitmask, packed.shape)
    count = int(there.sum())
    if packed.values.shape != (count,):
        raise ValueError(
            f"the bitmask announces {count} values, {tuple(packed.values.shape)} are there"
        )
    dense = torch.zeros(packed.shape, dtype=packed.values.dtype)
    dense[there] = packed.values
    return dense


def pack_state(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """`state` with the named tensors packed as `name.bitmask`, `name.values`, `name.shape`."""
    packed = {name: tensor for name, tensor in state.items() if name not in set(names)}
    for name in names:
        form = pack(state[name])
        packed[f"{name}.bitmask"] = form.bitmask
        packed[f"{name}.values"] = form.values
        packed[f"{name}.shape"] = torch.tensor(form.shape, dtype=torch.int64)
    return packed


def unpack_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that `pack_state` was given.

    Raises ValueError naming a tensor whose parts are missing or do not belong together.
    """
    names = [name.removesuffix(".bitmask") for name in packed if name.endswith(".bitmask")]
    parts = {f"{name}.{part}" for name in names for part in ("bitmask", "values", "shape")}
    state = {name: tensor for name, tensor in packed.items() if name not in parts}
    for name in names:
        if name in state:
            raise ValueError(f"the weight '{name}' is there twice, packed and plain")
        try:
            form = PackedWeight(
                bitmask=packed[f"{name}.bitmask"],
                values=packed[f"{name}.values"],
                shape=_sizes(packed[f"{name}.shape"]),
            )
            state[name] = unpack(form)
        except KeyError as error:
            raise ValueError(f"the packed weight '{name}' lacks {error}") from error
        except (ValueError, RuntimeError) as error:  # the last: sizes below zero
            raise ValueError(f"the packed weight '{name}' is damaged: {error}") from error
    return state


def _sizes(stored: Tensor) -> tuple[int, ...]:
    if stored.dtype != torch.int64 or stored.ndim != 1:
        raise ValueError(f"its shape is {tuple(stored.shape)} {stored.dtype}, not a row of int64")
    return tuple(stored.tolist())


def bytes_per_weight(sparsity: float, value_bytes: int) -> float:
    """Stored bytes per weight, values of `value_bytes` and one mask bit (section 5's cost)."""
    return value_bytes * (1 - sparsity) + 1 / 8

"""Open storage of quantized weights: little-endian bit streams, rows apart. Layout version 1.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 3 (two codes a
byte along the input dimension). A weight is stored as these tensors, under its name:

    header        (5,) int64: layout version 1, bits b, rows R, columns D, group size g (-1: D)
    codes         (R, ceil(D b / 8)) uint8: bits b j .. b j + b - 1 of a row's stream are code j,
                  least significant first; bit i of the stream is bit i mod 8 of byte i // 8
    scales        (R, G) float32, bfloat16 or float16; G = ceil(D / g)
    zeros         (R, ceil(G b / 8)) uint8: zero points, packed as the codes are; absent where all
                  are 2^(b-1) (symmetric grids)
    groups        (D,) int32: group of each column; absent where column j is in group j // g
    input_scales  (D,) float32: what inputs are divided by; absent where that is 1

    w_rj = scales_r,G (code_rj - zero_r,G) / input_scales_j        G = group of j

With 4 bits that is two codes a byte, the low nibble first. Bits after a row's last code are 0.
Bytes per weight: b / 8 + (bytes of a scale + b / 8) / g, without the zero point where symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.grid import SCALE_TYPES, QuantizedWeight, contiguous_groups

VERSION = 1
PARTS = ("header", "codes", "scales", "zeros", "groups", "input_scales")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, D) 0..2^b - 1 as bit streams (R, ceil(D b / 8)) uint8."""
    rows, columns = codes.shape
    if 8 % bits:
        places = torch.arange(bits, device=codes.device)
        stream = ((codes.int()[:, :, None] >> places) & 1).flatten(1)
        per_byte, width = 8, 1
    else:  # codes do not cross bytes
        stream, per_byte, width = codes.int(), 8 // bits, bits
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % per_byte))
    places = torch.arange(per_byte, device=codes.device) * width
    packed = (stream.unflatten(1, (-1, per_byte)) << places).sum(dim=2)
    return packed.to(torch.uint8).reshape(rows, -(-columns * bits // 8))


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (R, D) uint8 from `pack_codes`.

    Raises ValueError for too many or too few bytes, or bits set after the last code.
    """
    wanted = -(-columns * bits // 8)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != wanted:
        raise ValueError(
            f"{columns} codes of {bits} bits take rows of {wanted} uint8 bytes, not "
            f"{tuple(packed.shape)} {packed.dtype}"
        )
    width = bits if 8 % bits == 0 else 1
    places = torch.arange(0, 8, width, device=packed.device)
    stream = ((packed.int()[:, :, None] >> places) & (2**width - 1)).flatten(1)
    used = columns * bits // width
    if bool(stream[:, used:].any()):
        raise ValueError("bits are set after the last code of a row: the codes are damaged")
    stream = stream[:, :used]
    if width != bits:
        stream = stream.unflatten(1, (columns, bits)) << torch.arange(bits, device=packed.device)
        stream = stream.sum(dim=2)
    return stream.to(torch.uint8)


def pack_codes_reference(codes: Tensor, bits: int) -> Tensor:
    """`pack_codes` bit by bit through Python's whole numbers."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append(list(stream.to_bytes(-(-len(row) * bits // 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a weight, by part. Lossless."""
    rows, columns = weight.codes.shape
    header = [VERSION, weight.bits, rows, columns, weight.group_size]
    parts = {
        "header": torch.tensor(header, dtype=torch.int64),
        "codes": pack_codes(weight.codes, weight.bits),
        "scales": weight.scales.contiguous(),
    }
    if bool((weight.zero_points != 2 ** (weight.bits - 1)).any()):
        parts["zeros"] = pack_codes(weight.zero_points, weight.bits)
    if weight.groups is not None:
        parts["groups"] = weight.groups.to(torch.int32)
    if weight.input_scales is not None:
        parts["input_scales"] = weight.input_scales.float()
    return parts


def unpack(parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of `pack`'s tensors.

    Raises ValueError if one is missing, has another shape or precision, or holds what cannot be.
    """
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    bits, rows, columns, group_size = _header(parts["header"])
    groups = -(-columns // (columns if group_size == -1 else group_size))
    scales = parts["scales"]
    if tuple(scales.shape) != (rows, groups) or scales.dtype not in SCALE_TYPES.values():
        raise ValueError(
            f"scales are {tuple(scales.shape)} {scales.dtype}, not {(rows, groups)} of "
            f"{', '.join(SCALE_TYPES)}"
        )
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales hold NaN or infinite values")
    if "zeros" in parts:
        zero_points = unpack_codes(_rows(parts["zeros"], rows), bits, groups)
    else:
        zero_points = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(
        codes=unpack_codes(_rows(parts["codes"], rows), bits, columns),
        scales=scales,
        zero_points=zero_points,
        bits=bits,
        group_size=group_size,
        groups=checked_groups(parts.get("groups"), columns, groups),
        input_scales=checked_input_scales(parts.get("input_scales"), columns),
    )


def pack_state(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """The tensors of many weights as `name.part`, ready for safetensors."""
    return {
        f"{name}.{part}": tensor
        for name, weight in weights.items()
        for part, tensor in pack(weight).items()
    }


def unpack_state(state: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The weights in a state that may hold other tensors too; a weight is where a header is.

    Raises ValueError naming a weight that is damaged.
    """
    weights = {}
    for key in state:
        name, _, part = key.rpartition(".")
        if part != "header":
            continue
        parts = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
        try:
            weights[name] = unpack(parts)
        except ValueError as error:
            raise ValueError(f"the quantized weight '{name}' is damaged: {error}") from error
    return weights


def stored_bytes(weight: QuantizedWeight) -> int:
    """Bytes that `pack`'s tensors take, without the header."""
    parts = pack(weight)
    return sum(t.numel() * t.element_size() for part, t in parts.items() if part != "header")


def _header(header: Tensor) -> tuple[int, int, int, int]:
    """bits, rows, columns, group size."""
    if header.dtype != torch.int64 or tuple(header.shape) != (5,):
        raise ValueError(f"the header is {tuple(header.shape)} {header.dtype}, not (5,) int64")
    version, bits, rows, columns, group_size = (int(number) for number in header)
    if version != VERSION:
        raise ValueError(f"layout version {version} is not one this release reads ({VERSION})")
    if not (2 <= bits <= 8 and rows > 0 and columns > 0 and (group_size > 0 or group_size == -1)):
        raise ValueError(f"the header {header.tolist()} describes no weight")
    return bits, rows, columns, group_size


def _rows(packed: Tensor, rows: int) -> Tensor:
    if packed.ndim != 2 or packed.shape[0] != rows:
        raise ValueError(f"packed codes are {tuple(packed.shape)}, the header says {rows} rows")
    return packed


def checked_groups(stored: Tensor | None, columns: int, count: int) -> Tensor | None:
    """The group of each column as it is; ValueError for what cannot be."""
    if stored is None:
        return None
    if stored.dtype != torch.int32 or tuple(stored.shape) != (columns,):
        raise ValueError(f"groups are {tuple(stored.shape)} {stored.dtype}, not {(columns,)} int32")
    if int(stored.min()) < 0 or int(stored.max()) >= count:
        raise ValueError(f"a column is in a group outside 0..{count - 1}")
    return stored


def checked_input_scales(stored: Tensor | None, columns: int) -> Tensor | None:
    """Input scales as they are; ValueError for what cannot be."""
    if stored is None:
        return None
    if stored.dtype != torch.float32 or tuple(stored.shape) != (columns,):
        raise ValueError(
            f"input scales are {tuple(stored.shape)} {stored.dtype}, not {(columns,)} float32"
        )
    if not bool((torch.isfinite(stored) & (stored > 0)).all()):
        raise ValueError("input scales must be finite and above 0")
    return stored


def is_contiguous(groups: Tensor, group_size: int) -> bool:
    """Whether column j is in group j // g."""
    return bool((groups == contiguous_groups(len(groups), group_size, groups.device)).all())

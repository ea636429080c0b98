"""Folding: 1 / t of a layer's input moves into what makes that input.

Sources: J. Lin et al., "AWQ", MLSys 2024, section 4; W. Cheng et al., "TEQ", arXiv 2310.10944,
section 3.2. y = (X / t) Q^T costs a multiplication; where X comes from a norm's gain and bias, or
from the outputs of a linear layer with nothing but element-wise products in between (v to o, up to
down of a gated feed-forward), those are divided by t once and the function stays what it was.

A quantized layer before is divided in its scales, a row's in all its groups: its codes stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.grid import QuantizedWeight


def into_norm(weight: Tensor, bias: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gain (D,) and bias (D,) of a norm whose outputs are x / t. Raises ValueError for other D."""
    _check(weight.shape[0], t)
    return weight / t, None if bias is None else bias / t


def into_linear(weight: Tensor, bias: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (R, D) and bias (R,) of a linear layer whose outputs are x / t.

    Raises ValueError if t is not (R,): with shared key and value heads, v has fewer outputs than o
    has inputs.
    """
    _check(weight.shape[0], t)
    return weight / t[:, None], None if bias is None else bias / t


def into_quantized(
    weight: QuantizedWeight, bias: Tensor | None, t: Tensor
) -> tuple[QuantizedWeight, Tensor | None]:
    """`into_linear` of a quantized layer; scales stored in half precision are rounded again."""
    _check(weight.codes.shape[0], t)
    scales = (weight.scales.float() / t[:, None]).to(weight.scales.dtype)
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        raise ValueError(f"scales divided by the input scales do not fit {scales.dtype}")
    return replace(weight, scales=scales), None if bias is None else bias / t


def folded(weight: QuantizedWeight) -> QuantizedWeight:
    """The layer after: its input is x / t already."""
    return replace(weight, input_scales=None)


def _check(outputs: int, t: Tensor) -> None:
    if tuple(t.shape) != (outputs,):
        raise ValueError(
            f"{tuple(t.shape)} input scales cannot be folded into {outputs} outputs before"
        )
    if not bool((t > 0).all()):
        raise ValueError("input scales must be above 0")

"""Second moments of a layer's inputs, H = 2 X X^T, and the factor of its inverse.

Sources: E. Frantar, D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", ICML 2023, section 3; E. Frantar et al., "GPTQ", ICLR 2023, section 3.

The layer problem min ||W X - W' X||^2 splits into rows that share H. A convolution is the same
problem on unfolded inputs: column (channel, tap) of X holds what that tap sees of that channel.

R rows (output features)   D columns (inputs, or channels x taps)   N tokens or frames
G groups of a grouped convolution (1 elsewhere)   B batch   T frames   K taps
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Layer = nn.Linear | nn.Conv1d | Conv1D
LAYER_TYPES = (nn.Linear, nn.Conv1d, Conv1D)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A damped H and the upper triangular U with H^-1 = U^T U, so U_jj^2 = [(H_j:,j:)^-1]_jj."""

    upper: Tensor  # U (D, D)
    damped: Tensor  # H + lambda I, dead inputs set to 1 (D, D)
    dead: Tensor  # (D,) bool, inputs that were zero on every calibration token
    damping: float  # lambda / mean(diag H) that was needed; inf when only diag H was usable


def weight_matrix(layer: Layer) -> Tensor:
    """The weight as (G, R / G, D), a view or copy in the order of `layer_inputs`' columns."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv1d):
        return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    if isinstance(layer, Conv1D):  # transformers keeps (inputs, outputs)
        weight = weight.t()
    return weight[None]


def like_weight(layer: Layer, matrix: Tensor) -> Tensor:
    """A (G, R / G, D) matrix (weights or a mask) in the shape of `layer.weight`."""
    if isinstance(layer, nn.Conv1d):
        return matrix.reshape(layer.weight.shape)
    return matrix[0].t().contiguous() if isinstance(layer, Conv1D) else matrix[0]


def layer_inputs(layer: Layer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the weight is multiplied with: (G, D, N).

    Args:
        layer: a linear layer or a convolution with zero padding.
        x: its input, (..., D) of a linear layer, (B, channels, T) of a convolution.
        mask: (B, T), non-zero on real frames or tokens; padded ones are left out, also of an
            input (B T, D) whose axes were flattened. Ignored for an input without a time axis (a
            vector per utterance).

    Raises:
        ValueError: a convolution whose padding is not zeros, or a mask of another shape.
    """
    if not isinstance(layer, nn.Conv1d):
        x = x.detach()
        tokens = x.reshape(-1, x.shape[-1])
        if mask is not None and x.ndim == 3:
            _check_mask(mask, (x.shape[0], x.shape[1]))
        flat = x.ndim == 2 and mask is not None and len(x) == mask.numel()  # OPT's fc1 and fc2
        if mask is not None and (x.ndim == 3 or flat):
            tokens = tokens[mask.reshape(-1) != 0]
        return tokens.t()[None]
    columns_BDT = _unfold(layer, x.detach(), mask)
    grouped = columns_BDT.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    if mask is None:
        return grouped
    return grouped[:, :, _output_mask(layer, mask, columns_BDT.shape[2]).reshape(-1)]


def _unfold(layer: nn.Conv1d, x: Tensor, mask: Tensor | None) -> Tensor:
    if layer.padding_mode != "zeros":
        raise ValueError(f"only zero padding can be unfolded, not '{layer.padding_mode}'")
    if mask is not None:
        _check_mask(mask, (x.shape[0], x.shape[2]))
        x = x * (mask != 0)[:, None, :].to(x.dtype)
    left, right = _padding(layer)
    x = F.pad(x, (left, right))
    return F.unfold(
        x[:, :, None, :],
        (1, layer.kernel_size[0]),
        dilation=(1, layer.dilation[0]),
        stride=(1, layer.stride[0]),
    )


def _padding(layer: nn.Conv1d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[0] * (layer.kernel_size[0] - 1)
        return total // 2, total - total // 2
    return int(layer.padding[0]), int(layer.padding[0])


def _output_mask(layer: nn.Conv1d, mask: Tensor, frames: int) -> Tensor:
    """Which output frames are real: those whose middle tap sees a real frame. (B, frames) bool."""
    reach = layer.dilation[0] * (layer.kernel_size[0] - 1) // 2
    middle = torch.arange(frames) * layer.stride[0] - _padding(layer)[0] + reach
    return (mask != 0)[:, middle.clamp(0, mask.shape[1] - 1).to(mask.device)]


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    if tuple(mask.shape) != shape:
        raise ValueError(f"the mask is {tuple(mask.shape)}, the layer's input has {shape} frames")


class HessianAccumulator:
    """H = 2 X X^T (G, D, D) summed over batches, in float64 (half-precision sums lose rank)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        """`dtype` float32 is for a GPU, most of which are slow in float64."""
        self.dtype = dtype
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, columns: Tensor) -> None:
        """Add inputs (G, D, N).

        Raises ValueError for NaN or infinite inputs: one of them would poison all of H.
        """
        if not bool(torch.isfinite(columns).all()):
            raise ValueError(
                "the layer's calibration inputs hold NaN or infinite values: look for them in the "
                "weights before it and in the calibration rows"
            )
        columns = columns.to(self.dtype)
        product = 2 * columns @ columns.transpose(1, 2)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.tokens += columns.shape[2]

    def hessian(self) -> Tensor:
        """H (G, D, D). Raises ValueError before any token was added."""
        if self._sum is None or self.tokens == 0:
            raise ValueError("no calibration inputs reached this layer")
        return self._sum


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Damp H (D, D) and factor its inverse, steps 1-3 of SparseGPT.

    Dead inputs (H_jj = 0) get H_jj = 1. lambda = damping * mean(diag H) is raised tenfold, up to
    1.0, while H is not positive definite; if even that fails, diag H alone is used.

    H = R R^T with R upper triangular is the Cholesky factor of H turned by 180 degrees, and
    U = R^-1: one factorisation and one triangular solve, H^-1 itself is never formed.

    Raises ValueError if H is not square or not finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"H must be square, not {tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("H holds NaN or infinite values; look at the calibration inputs")
    size = hessian.shape[0]
    eye = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    dead = hessian.diagonal() == 0
    alive = hessian + torch.diag(dead.to(hessian.dtype))
    mean = hessian.diagonal().mean() if bool((~dead).any()) else hessian.new_tensor(1.0)
    share = damping
    while True:
        damped = alive + share * mean * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0 and bool(torch.isfinite(lower).all()):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return Factor(upper=upper, damped=damped, dead=dead, damping=share)
        if share >= 1.0:
            break
        share = min(max(10 * share, 1e-6), 1.0)
    damped = torch.diag(alive.diagonal() + mean)
    return Factor(
        upper=torch.diag(damped.diagonal().rsqrt()), damped=damped, dead=dead, damping=float("inf")
    )

"""AWQ: input channels of large activations get a finer grid, by scaling them into the weights.

Source: J. Lin, J. Tang, H. Tang, et al., "AWQ: Activation-aware Weight Quantization for On-Device
LLM Compression and Acceleration", MLSys 2024, equations (4)-(5) and section 4.

    y = (X / t) Q(W diag t)^T      t = a^alpha / sqrt(max a^alpha min a^alpha)      a_j = mean|X_j|

alpha in {0, 1/20, .., 19/20} is searched per set of layers that share an input, by the error of the
block's output; then each group's range is cut where its outputs err less for it. alpha = 0 and the
whole range are RTN, and a step that does not lower the block's error is not taken: on the
calibration samples the result is never worse than RTN.

Unlike the authors' code, which keeps all other layers float in a search, sets searched before are
in their final form and the others on RTN's grids (that is what makes the guarantee one of the whole
block), and the clipping search sees all tokens, through H, not 512.

R rows   D columns   N tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.weight_only import clipping
from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import (
    GridSettings,
    QuantizedWeight,
    group_columns,
    round_to_grid,
)

LEAST = 1e-4
"""Lower bound of a^alpha: a channel that is never active keeps a finite scale."""


READS: frozenset[str] = frozenset(("hessians", "outputs"))
"""What the method reads of a block's calibration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of AWQ."""

    steps: int = 20  # values of alpha tried: 0, 1 / steps, .., 1 - 1 / steps
    clip: bool = True  # search a narrower range per group, where the block allows it
    batch: int = 32  # samples in memory at a time; a bound on memory, not on the result

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError("steps and batch must be at least 1")


def quantize(
    block: Block, *, grid: GridSettings, settings: Settings, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Search input scales and ranges, set by set in the block's order; `seed` is not used.

    Input scales are shared by a set and stand beside its codes until `folding` moves them into
    the layer before. Sets with a layer in `block.unscaled` keep t = 1; layers in `block.unclipped`
    keep their range.

    Raises ValueError for weights that do not divide into groups or are not finite.
    """
    state = _State(block, settings)
    state.try_out({name: round_to_grid(weight, grid) for name, weight in block.weights.items()})
    for names in block.sets:
        t = torch.ones_like(block.inputs[names[0]][0])
        if not block.unscaled.intersection(names):
            activity = block.inputs[names[0]].abs().mean(dim=0)
            for step in range(1, settings.steps):
                trial = input_scales(activity, step / settings.steps)
                if state.try_out(_scaled(block, names, trial, grid)):
                    t = trial
        if settings.clip:
            clipped = [name for name in names if name not in block.unclipped]
            state.try_out(_clipped(block, clipped, block.hessians[names[0]], t, grid))
    return state.quantized


def input_scales(activity: Tensor, alpha: float) -> Tensor:
    """t (D,) from a = mean|X_j| (D,): equation (5), centred so that sqrt(max t min t) = 1."""
    t = activity.float().pow(alpha).clamp(min=LEAST)
    return t / (t.max() * t.min()).sqrt()


class _State:
    """The best quantization so far and its error on the block's outputs."""

    def __init__(self, block: Block, settings: Settings) -> None:
        self.block, self.batch = block, settings.batch
        self.quantized: dict[str, QuantizedWeight] = {}
        self.effective: dict[str, Tensor] = {}
        self.error = float("inf")

    def try_out(self, changed: dict[str, QuantizedWeight]) -> bool:
        """Take the changed weights if the block's error falls; whether it did."""
        effective = {name: weight.effective() for name, weight in changed.items()}
        error = self.block.total_error({**self.effective, **effective}, self.batch)
        if self.quantized and not error < self.error:
            return False
        self.quantized.update(changed)
        self.effective.update(effective)
        self.error = error
        return True


def _scaled(
    block: Block, names: tuple[str, ...], t: Tensor, grid: GridSettings
) -> dict[str, QuantizedWeight]:
    return {name: round_to_grid(block.weights[name] * t, grid, input_scales=t) for name in names}


def _clipped(
    block: Block, names: list[str], hessian: Tensor, t: Tensor, grid: GridSettings
) -> dict[str, QuantizedWeight]:
    moments = clipping.group_moments(hessian / torch.outer(t, t), grid.group_size)
    quantized = {}
    for name in names:
        weight = block.weights[name] * t
        grouped = group_columns(weight.float(), grid.group_size)
        low, high = clipping.by_output_error(grouped, moments, grid)
        kept = None if bool((t == 1).all()) else t
        quantized[name] = round_to_grid(weight, grid, low=low, high=high, input_scales=kept)
    return quantized

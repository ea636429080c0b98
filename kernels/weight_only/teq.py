"""TEQ: the input scales of AWQ's transformation, trained instead of searched.

Source: W. Cheng, Y. Cai, K. Lv, H. Shen, "TEQ: Trainable Equivalent Transformation for Quantization
of LLMs", arXiv 2310.10944, section 3.

    y = (X / t) Q(W diag t)^T       t (D,) trained from 1, rounding counted as the identity

The loss is the block's criterion: the mean square error of its output or, for a block that is a
whole language model with labels as targets, the model's own loss. t is all that is trained, one
vector for every set of layers that share an input.

R rows   D columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.weight_only.block import Block, sample_batches
from goldcrest.kernels.weight_only.grid import (
    GridSettings,
    QuantizedWeight,
    bounds,
    check_weight,
    fake_quantize,
    group_columns,
    parameters,
    round_to_grid,
    ungroup_columns,
)

LEAST = 1e-5
"""Lower bound of a scale."""

Scales = dict[tuple[str, ...], Tensor]
"""t (D,) of each set that has one."""


READS: frozenset[str] = frozenset(("outputs",))
"""What the method reads of a block's calibration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of TEQ."""

    steps: int = 1000  # of Adam
    learning_rate: float = 1e-3  # falls linearly to 0
    batch: int = 8  # samples per step

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise ValueError("steps must be at least 0, batch at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")


def quantize(
    block: Block, *, grid: GridSettings, settings: Settings, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Train the scales of a block's inputs; `seed` orders the samples.

    Losses of different batches do not compare, so the scales of the least one, the last ones, and
    t = 1 (RTN) are measured on all samples and the best are returned: never worse than RTN there.

    Raises ValueError for weights that do not divide into groups or are not finite.
    """
    for weight in block.weights.values():
        check_weight(weight, grid)
    start: Scales = {
        names: torch.ones_like(block.weights[names[0]][0], dtype=torch.float32)
        for names in block.sets
        if not block.unscaled.intersection(names)
    }
    candidates = [{}, *train(block, start, grid, settings, seed=seed)] if start else [{}]
    results = [_quantized(block, scales, grid) for scales in candidates]
    chosen = block.best(
        {name: weight.effective() for name, weight in result.items()} for result in results
    )
    return results[chosen]


def train(
    block: Block, start: Scales, grid: GridSettings, settings: Settings, *, seed: int
) -> tuple[Scales, Scales]:
    """Adam on the scales from `start`: those of the least batch loss, and the last ones."""
    scales = {names: t.clone().requires_grad_() for names, t in start.items()}
    optimizer = torch.optim.Adam(scales.values(), lr=settings.learning_rate)
    best, least = start, float("inf")
    batches = sample_batches(block, settings.batch, seed)
    for step, indices in zip(range(settings.steps), batches, strict=False):
        loss = block.error(_effective(block, scales, grid), indices)
        if (now := float(loss.detach())) < least:
            best, least = _copy(scales), now
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        optimizer.zero_grad()
        # Of a module's other parameters no gradient is kept: the block is to stay as it was.
        loss.backward(inputs=list(scales.values()))
        optimizer.step()
        with torch.no_grad():
            for t in scales.values():
                t.clamp_(min=LEAST)
    return best, _copy(scales)


def _effective(block: Block, scales: Scales, grid: GridSettings) -> dict[str, Tensor]:
    """What stands in for the weights, with gradients to the scales."""
    effective = {}
    for names in block.sets:
        t = scales.get(names)
        for name in names:
            weight = block.weights[name].float()
            scaled = weight if t is None else weight * t
            grouped = group_columns(scaled, grid.group_size)
            steps, zero_points = parameters(*bounds(grouped), grid)
            rounded = fake_quantize(grouped, steps, zero_points, grid.top)
            rounded = ungroup_columns(rounded, weight.shape[1])
            effective[name] = rounded if t is None else rounded / t
    return effective


def _quantized(block: Block, scales: Scales, grid: GridSettings) -> dict[str, QuantizedWeight]:
    quantized = {}
    for names in block.sets:
        t = scales.get(names)
        for name in names:
            weight = block.weights[name].float()
            quantized[name] = round_to_grid(
                weight if t is None else weight * t, grid, input_scales=t
            )
    return {name: quantized[name] for name in block.weights}


def _copy(scales: Scales) -> Scales:
    return {names: t.detach().clone() for names, t in scales.items()}

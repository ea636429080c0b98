"""AutoRound: which way each weight rounds, and how far each range reaches, by SignSGD.

Source: W. Cheng, W. Zhang, H. Shen, et al., "Optimize Weight Rounding via Signed Gradient Descent
for the Quantization of LLMs", EMNLP Findings 2024 (SignRound), equations (3)-(6), algorithm 1.

    q = clamp(round(w / s + V) + z, 0, 2^b - 1)      s, z of the range [c min, a max]
    L = mean (block(X; W) - block(X; W^))^2          V, a, c <- clip(. - lr sign(dL/d.))

V in [-1/2, 1/2] per weight from 0, a and c in [0, 1] per group from 1; rounding counts as the
identity; lr falls linearly from 1 / iterations to 0. All steps together are about 1/2 long, so V
alone moves a weight to a neighbouring code at most.

The authors keep the parameters of the least batch loss. Losses of different batches do not compare,
so here those, the last ones and the start (RTN) are measured on all samples and the best are kept:
never worse than RTN there.

R rows   G groups   g columns of a group
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

READS: frozenset[str] = frozenset(("outputs",))
"""What the method reads of a block's calibration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of AutoRound; the authors' other recipes are 1000 and 50 iterations (lr 5e-3)."""

    iterations: int = 200  # steps of SignSGD; 0: RTN
    learning_rate: float | None = None  # at the start; None: 1 / iterations
    batch: int = 8  # samples per step
    tune_range: bool = True  # train a and c too, not V alone
    keep_zeros: bool = False  # zeros of the incoming weight stay zero (pruned weights)

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch < 1:
            raise ValueError("iterations must be at least 0, batch at least 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What is trained of one weight."""

    offset: Tensor  # V (R, G, g), in steps
    high: Tensor  # a (R, G), share of the range above 0
    low: Tensor  # c (R, G), share of the range below 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, a, c."""
        return self.offset, self.high, self.low

    def copy(self) -> Rounding:
        """The same values, detached."""
        offset, high, low = (tensor.detach().clone() for tensor in self.tensors())
        return Rounding(offset=offset, high=high, low=low)


def quantize(
    block: Block, *, grid: GridSettings, settings: Settings, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Train the rounding of all weights of a block together; `seed` orders the samples.

    Raises ValueError for weights that do not divide into groups or are not finite.
    """
    problems = {}
    for name, weight in block.weights.items():
        check_weight(weight, grid)
        problems[name] = _Problem(weight, grid, settings)
    start = {name: problem.start() for name, problem in problems.items()}
    candidates = [start]
    if settings.iterations:
        candidates += train(block, problems, start, settings, seed=seed)
    results = [
        {name: problems[name].quantized(rounding) for name, rounding in candidate.items()}
        for candidate in candidates
    ]
    chosen = block.best(
        {name: weight.effective() for name, weight in result.items()} for result in results
    )
    return results[chosen]


def train(
    block: Block,
    problems: dict[str, _Problem],
    start: dict[str, Rounding],
    settings: Settings,
    *,
    seed: int,
) -> tuple[dict[str, Rounding], dict[str, Rounding]]:
    """SignSGD from `start`: the roundings of the least batch loss, and the last ones."""
    roundings = {name: rounding.copy() for name, rounding in start.items()}
    trained = [
        tensor.requires_grad_()
        for rounding in roundings.values()
        for tensor in rounding.tensors()[: 3 if settings.tune_range else 1]
    ]
    rate = settings.learning_rate or 1 / settings.iterations
    best, least = start, float("inf")
    batches = sample_batches(block, settings.batch, seed)
    for step, indices in zip(range(settings.iterations), batches, strict=False):
        weights = {name: problems[name].rounded(item) for name, item in roundings.items()}
        loss = block.error(weights, indices)
        if (now := float(loss.detach())) < least:
            best = {name: rounding.copy() for name, rounding in roundings.items()}
            least = now
        slopes = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for tensor, slope in zip(trained, slopes, strict=True):
                tensor -= rate * (1 - step / settings.iterations) * slope.sign()
            for rounding in roundings.values():
                rounding.offset.clamp_(-0.5, 0.5)
                rounding.high.clamp_(0, 1)
                rounding.low.clamp_(0, 1)
    return best, {name: rounding.copy() for name, rounding in roundings.items()}


class _Problem:
    """One weight in groups, and the range of each."""

    def __init__(self, weight: Tensor, grid: GridSettings, settings: Settings) -> None:
        self.weight, self.grid = weight.float(), grid
        self.grouped = group_columns(self.weight, grid.group_size)
        self.low, self.high = bounds(self.grouped)
        self.free = (self.grouped != 0) if settings.keep_zeros else torch.tensor(True)

    def start(self) -> Rounding:
        """V = 0, a = c = 1: RTN."""
        return Rounding(
            offset=torch.zeros_like(self.grouped),
            high=torch.ones_like(self.high),
            low=torch.ones_like(self.low),
        )

    def rounded(self, rounding: Rounding) -> Tensor:
        """W^ (R, D), with gradients to the rounding."""
        scales, zero_points = parameters(
            self.low * rounding.low, self.high * rounding.high, self.grid
        )
        offset = rounding.offset * self.free
        groups = fake_quantize(self.grouped, scales, zero_points, self.grid.top, offset)
        return ungroup_columns(groups, self.weight.shape[1])

    def quantized(self, rounding: Rounding) -> QuantizedWeight:
        """The codes that `rounded` stands for."""
        return round_to_grid(
            self.weight,
            self.grid,
            low=self.low * rounding.low,
            high=self.high * rounding.high,
            offset=rounding.offset * self.free,
        )

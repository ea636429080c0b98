"""How much each operation of a transformer would suffer from INT8: scores that choose what to skip.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3.4: operations whose input activations have the highest kurtosis stay in
floating point. Largest magnitude and range look at the same inputs; "measured" quantizes one
operation at a time and takes the loss on the calibration batches, which is exact and costs one
pass over them per operation.

An operation is a linear layer or the two products of an attention layer, by the module's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from goldcrest.kernels.language.sequential import Batch, walk
from goldcrest.kernels.quantization.calibration import MinMax, Moments
from goldcrest.kernels.quantization.int8 import grid_of_range, quantize_weight, weight_scales
from goldcrest.kernels.quantization.int8_attention import AttentionObserver
from goldcrest.kernels.quantization.int8_linear import Int8Linear
from goldcrest.kernels.quantization.kurtosis import Criterion
from goldcrest.kernels.quantization.transformer_inputs import (
    masks_of,
    observed,
    outside_linears,
    see_block,
    see_outside,
)
from goldcrest.kernels.sparsity.hessian import weight_matrix

SkipBy = Criterion | Literal["measured"]
"""What ranks operations: their inputs, or the loss with only that operation quantized."""


class InputStatistics:
    """Moments and ranges of what every operation reads, by its name."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.ranges: dict[str, MinMax] = {}
        self.attentions: dict[str, AttentionObserver] = {}

    def see(self, name: str, _: nn.Module, x: Tensor) -> None:
        """Take rows (N, D) that a linear layer reads."""
        self.moments.setdefault(name, Moments()).observe(x)
        self.ranges.setdefault(name, MinMax()).observe(x)

    def scores(self, criterion: Criterion) -> dict[str, float]:
        """The criterion of each operation; of an attention, the worst of its three inputs."""
        moments = {name: [each] for name, each in self.moments.items()}
        ranges = {name: [each] for name, each in self.ranges.items()}
        for name, seen in self.attentions.items():
            moments[name] = list(seen.moments.values())
            ranges[name] = list(seen.ranges.values())
        if criterion == "kurtosis":
            return {name: max(each.kurtosis() for each in some) for name, some in moments.items()}
        if criterion == "max_abs":
            return {name: max(each.largest for each in some) for name, some in moments.items()}
        return {name: max(each.high - each.low for each in some) for name, some in ranges.items()}


def input_statistics(
    model: nn.Module, batches: Sequence[Batch], attentions: Sequence[str]
) -> InputStatistics:
    """Watch every operation's inputs, block after block."""
    masks = [masks_of(model, batch) for batch in batches]
    statistics = InputStatistics()
    for step in walk(model, batches):
        inside = [name for name in attentions if name.startswith(f"{step.block.name}.")]
        with observed({name: model.get_submodule(name) for name in inside}) as observers:
            see_block(step, masks, statistics.see)
        statistics.attentions.update(observers)
    decoder = [mask.decoder for mask in masks]
    see_outside(model, outside_linears(model), batches, decoder, statistics.see)
    return statistics


def measured_losses(
    model: nn.Module, batches: Sequence[Batch], statistics: InputStatistics, *, dynamic: bool
) -> dict[str, float]:
    """Mean loss on the batches with one operation at a time in INT8, weights rounded to nearest.

    Raises ValueError where the batches have no labels.
    """
    if any("labels" not in batch for batch in batches):
        raise ValueError("sensitivity is measured by the loss: the batches need labels")
    losses = {}
    for name, seen in statistics.ranges.items():
        with _one_linear(model, name, seen, dynamic=dynamic):
            losses[name] = mean_loss(model, batches)
    for name, observer in statistics.attentions.items():
        module = model.get_submodule(name)
        module.int8 = observer.grids(dynamic=dynamic)
        losses[name] = mean_loss(model, batches)
        del module.int8
    return losses


@contextmanager
def _one_linear(model: nn.Module, name: str, seen: MinMax, *, dynamic: bool) -> Iterator[None]:
    layer = model.get_submodule(name)
    grid = None if dynamic else grid_of_range(*seen.range())
    weight = weight_matrix(layer)[0]  # type: ignore[arg-type]
    scales = weight_scales(weight)
    bias = getattr(layer, "bias", None)
    small = Int8Linear.from_codes(quantize_weight(weight, scales), scales, bias, grid)
    model.set_submodule(name, small)
    try:
        yield
    finally:
        model.set_submodule(name, layer)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The model's own loss on labelled batches, each by its labelled tokens, natural logarithm."""
    counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
    losses = [float(model(**batch).loss) for batch in batches]
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


def highest(scores: Mapping[str, float], count: int) -> list[str]:
    """The `count` names of the highest scores, ties by name."""
    return sorted(scores, key=lambda name: (-scores[name], name))[:count]

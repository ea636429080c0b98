"""What a method quantizes together, and what calibration shows of it.

Sources: J. Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, section 3.2 (layers that share an input share its scales); W. Cheng et
al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", EMNLP
Findings 2024, section 3 (the error is that of a block's output, not of each layer's).

R rows (outputs)   D columns (inputs)   N tokens   S samples (sequences) of the block's input
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.sparsity.hessian import (
    HessianAccumulator,
    layer_inputs,
    like_weight,
    weight_matrix,
)

Weights = Mapping[str, Tensor]
"""Weights (R, D) by name."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Linear layers that are quantized together.

    `forward(weights, indices)` gives the outputs, (len(indices), ...), of the calibration samples
    `indices` with the named weights in place (others as they are); differentiable in the weights.
    What must not count (padding) it leaves out or sets to the target's value.

    `dataclasses.replace(block, unscaled=..., unclipped=...)` adds what the architecture forbids.
    """

    weights: Weights  # (R, D) float each, in the order of the model
    sets: tuple[tuple[str, ...], ...]  # names that read the same input, every name once
    inputs: Weights  # (N, D) float, tokens that reach a set, under the name of its first layer
    hessians: Weights  # 2 X X^T (D, D) of all calibration tokens, under the same names
    tokens: int  # N of all calibration tokens, those of `hessians`
    forward: Callable[[Weights, Tensor], Tensor]
    targets: Tensor  # (S, ...) what `forward` should give: the float model's outputs, or labels
    criterion: Callable[[Tensor, Tensor], Tensor] = F.mse_loss  # (outputs, targets) -> mean error
    unscaled: frozenset[str] = field(default_factory=frozenset)  # names whose input keeps t = 1
    unclipped: frozenset[str] = field(default_factory=frozenset)  # names whose range is kept (q, k)

    def __post_init__(self) -> None:
        listed = [name for names in self.sets for name in names]
        if sorted(listed) != sorted(self.weights) or not listed:
            raise ValueError(
                f"the sets {self.sets} must name every weight once; there are "
                f"{', '.join(self.weights) or 'none'}"
            )
        for names in self.sets:
            widths = {self.weights[name].shape[1] for name in names}
            if len(widths) > 1:
                raise ValueError(f"{', '.join(names)} cannot read one input: widths {widths}")
            for kind, found in (("inputs", self.inputs), ("hessians", self.hessians)):
                if names[0] not in found or found[names[0]].shape[1] not in widths:
                    raise ValueError(f"no {kind} of width {widths} for '{names[0]}'")
        if self.tokens < 1 or len(self.targets) < 1:
            raise ValueError("there are no calibration samples")

    @property
    def samples(self) -> int:
        """S."""
        return len(self.targets)

    def error(self, weights: Weights, indices: Tensor) -> Tensor:
        """The criterion on some samples, a scalar with gradients to `weights`."""
        return self.criterion(self.forward(weights, indices), self.targets[indices])

    @torch.no_grad()
    def total_error(self, weights: Weights, batch: int = 32) -> float:
        """The criterion over all samples, `batch` at a time, in order."""
        total = 0.0
        for indices in torch.arange(self.samples).split(batch):
            total += float(self.error(weights, indices)) * len(indices)
        return total / self.samples

    def best(self, candidates: Iterable[Weights]) -> int:
        """Which of the candidates has the least error over all samples; the first among equals."""
        errors = [self.total_error(weights) for weights in candidates]
        return errors.index(min(errors))


def sample_batches(block: Block, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of samples without end: shuffled, every sample once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(block.samples, generator=generator).split(batch)


def of_linears(weights: Weights, inputs: Tensor) -> Block:
    """Linear layers that read the same tokens (N, D); a token is a sample, outputs side by side.

    Raises ValueError for inputs that do not fit, are not finite, or are none.
    """
    for name, weight in weights.items():
        if inputs.ndim != 2 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
            raise ValueError(
                f"inputs {tuple(inputs.shape)} do not fit '{name}' {tuple(weight.shape)}"
            )
    weights = {name: weight.detach() for name, weight in weights.items()}
    inputs = inputs.detach()
    accumulator = HessianAccumulator()
    accumulator.add(inputs.t()[None])
    names = tuple(weights)

    def forward(given: Weights, indices: Tensor) -> Tensor:
        x = inputs[indices]
        return torch.cat([x @ given.get(name, weights[name]).t() for name in names], dim=1)

    return Block(
        weights=weights,
        sets=(names,),
        inputs={names[0]: inputs},
        hessians={names[0]: accumulator.hessian()[0]},
        tokens=len(inputs),
        forward=forward,
        targets=forward({}, torch.arange(len(inputs))),
    )


def of_module(
    module: nn.Module,
    run: Callable[[Callable[..., Any], Tensor], Tensor],
    samples: int,
    *,
    sets: tuple[tuple[str, ...], ...],
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    batch: int = 8,
    keep: int = 4096,
) -> Block:
    """The linear layers of a module, say a transformer block.

    Args:
        module: left as it is; in eval mode, or its dropout is calibrated too.
        run: `run(call, indices)` calls `call(...)` with the module's arguments for those samples
            and returns the outputs (len(indices), ...), for instance
            `lambda call, i: call(hidden[i], attention_mask=mask[i])[0]`.
        samples: S.
        sets: names of linear layers in `module`; those of a set read the same input.
        targets: (S, ...), what the float model gives where `run` feeds outputs of quantized blocks
            before this one; None: the outputs now.
        mask: (S, T), non-zero on real tokens of layer inputs (S, T, D); None if all are real.
        batch: samples run at a time.
        keep: about how many tokens of each input are kept, evenly spaced; H sees them all.

    Raises:
        ValueError: a name that is not a linear layer, inputs that are not finite, no samples, or
            another number of targets.
    """
    if samples < 1:
        raise ValueError("there are no calibration samples")
    if targets is not None and len(targets) != samples:
        raise ValueError(f"there are {len(targets)} targets for {samples} calibration samples")
    modules = dict(module.named_modules())
    layers: dict[str, nn.Linear | Conv1D] = {}
    for name in (name for names in sets for name in names):
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(f"'{name}' is not a linear layer of this {type(module).__name__}")
        layers[name] = layer
    firsts = [names[0] for names in sets]
    accumulators = {name: HessianAccumulator() for name in firsts}
    kept: dict[str, list[Tensor]] = {name: [] for name in firsts}
    outputs = []
    share = -(-keep * batch // samples)
    with torch.no_grad():
        for indices in torch.arange(samples).split(batch):
            with _first_arguments({name: layers[name] for name in firsts}) as seen:
                outputs.append(run(module, indices))
            for name in firsts:
                if name not in seen:
                    raise ValueError(f"the layer '{name}' was not reached by the calibration")
                real = None if mask is None else mask[indices]
                columns = layer_inputs(layers[name], seen[name], real)
                accumulators[name].add(columns)
                stride = max(1, columns.shape[2] // share)
                kept[name].append(columns[0].t()[::stride].float())

    def forward(given: Weights, indices: Tensor) -> Tensor:
        placed = {
            f"{name}.weight": like_weight(layers[name], weight[None]).to(layers[name].weight.dtype)
            for name, weight in given.items()
        }
        return run(lambda *args, **kwargs: functional_call(module, placed, args, kwargs), indices)

    return Block(
        weights={name: weight_matrix(layer)[0].float() for name, layer in layers.items()},
        sets=sets,
        inputs={name: torch.cat(parts) for name, parts in kept.items()},
        hessians={name: accumulator.hessian()[0] for name, accumulator in accumulators.items()},
        tokens=min(accumulator.tokens for accumulator in accumulators.values()),
        forward=forward,
        targets=torch.cat(outputs) if targets is None else targets,
    )


@contextmanager
def _first_arguments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the layers are called with, by name, while the context lasts."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].detach()})
        )
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

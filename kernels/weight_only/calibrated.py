"""A transformer block, as `sequential.walk` reaches it, in the form that the methods quantize.

A calibration batch is a sample: what is trained or searched takes batches one by one, so that no
two of them need the same length. Padding counts nowhere: not in H, not in the inputs that are kept,
not in outputs (where it is 0 on both sides).

D columns   N tokens   S batches   L real tokens of the longest batch
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.language.sequential import BlockStep
from goldcrest.kernels.sparsity.hessian import (
    HessianAccumulator,
    layer_inputs,
    like_weight,
    weight_matrix,
)
from goldcrest.kernels.weight_only.block import Block, Weights

Linear = nn.Linear | Conv1D
Masks = Sequence[Tensor | None]
"""Real tokens (B, T) bool of each batch, None where all are."""

KEPT_TOKENS = 4096
"""About so many tokens of each input are kept; H sees them all."""


def block_of(
    step: BlockStep,
    layers: Mapping[str, Linear],
    sets: tuple[tuple[str, ...], ...],
    *,
    masks: Masks,
    outside: Masks,
    targets: Tensor,
    reads: Collection[str],
    unscaled: frozenset[str],
    unclipped: frozenset[str],
) -> Block:
    """The layers of a step's block, with what calibration shows of them.

    Args:
        step: the block and what it is fed.
        layers: the float layers to quantize, under their full names.
        sets: names of layers that read one input.
        masks: of the block's own tokens.
        outside: of the tokens that come from outside, an encoder's.
        targets: (S, L, D), `outputs` of the float model.
        reads: what the method reads; H is made only if it is among them.
        unscaled, unclipped: as in `Block`.
    """
    inputs = _Inputs(step, layers, [names[0] for names in sets], "hessians" in reads)
    if reads:
        inputs.collect(masks, outside)
    local = {name: name.removeprefix(f"{step.block.name}.") for name in layers}

    def forward(given: Weights, indices: Tensor) -> Tensor:
        placed = {
            f"{local[name]}.weight": like_weight(layers[name], weight[None]).to(
                layers[name].weight.dtype
            )
            for name, weight in given.items()
        }
        module = partial(_call, step.block.module, placed)
        return outputs(step, masks, indices.tolist(), targets.shape[1], module=module)

    return Block(
        weights={name: weight_matrix(layer)[0].float() for name, layer in layers.items()},
        sets=sets,
        inputs=inputs.kept(),
        hessians=inputs.hessians(),
        tokens=max(1, inputs.tokens),
        forward=forward,
        targets=targets,
        unscaled=unscaled,
        unclipped=unclipped,
    )


def outputs(
    step: BlockStep,
    masks: Masks,
    indices: Sequence[int],
    length: int,
    *,
    module: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The block's outputs (len(indices), L, D) at real tokens; `module` is called in its place."""
    found = [step.run(index, module=module) for index in indices]
    return real_tokens(found, [masks[index] for index in indices], length)


def real_tokens(hidden: Sequence[Tensor], masks: Masks, length: int) -> Tensor:
    """Hidden states (B, T, D) of some batches at real tokens (S, L, D), filled up with zeros."""
    found = []
    for states, mask in zip(hidden, masks, strict=True):
        real = states.flatten(0, 1) if mask is None else states[mask]
        found.append(F.pad(real, (0, 0, 0, length - len(real))))
    return torch.stack(found)


def longest(step: BlockStep, masks: Masks) -> int:
    """L, the real tokens of the batch that has most."""
    return max(
        hidden.shape[0] * hidden.shape[1] if mask is None else int(mask.sum())
        for hidden, mask in zip(step.hidden, masks, strict=True)
    )


def _call(module: nn.Module, placed: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
    return functional_call(module, placed, args, kwargs)


class _Inputs:
    """Inputs of some layers over all batches: a share of their tokens, and H."""

    def __init__(
        self, step: BlockStep, layers: Mapping[str, Linear], firsts: list[str], hessians: bool
    ) -> None:
        self.step = step
        self.layers = {name: layers[name] for name in firsts}
        self.accumulators = {name: HessianAccumulator() for name in firsts}
        self.parts: dict[str, list[Tensor]] = {name: [] for name in firsts}
        self.counts = dict.fromkeys(firsts, 0)
        self.with_hessians = hessians

    @property
    def tokens(self) -> int:
        """N of the input that least tokens reached."""
        return min(self.counts.values())

    @torch.no_grad()
    def collect(self, masks: Masks, outside: Masks) -> None:
        """Run every batch once, as the block is now."""
        share = -(-KEPT_TOKENS // len(self.step))
        for index in range(len(self.step)):
            seen: dict[str, Tensor] = {}
            handles = [
                layer.register_forward_pre_hook(
                    lambda _, arguments, name=name, seen=seen: seen.update({name: arguments[0]})
                )
                for name, layer in self.layers.items()
            ]
            try:
                self.step.run(index)
            finally:
                for handle in handles:
                    handle.remove()
            for name, x in seen.items():
                foreign = any(x.data_ptr() == y.data_ptr() for y in self.step.beside(index))
                mask = (outside if foreign else masks)[index]
                columns = layer_inputs(self.layers[name], x, mask)
                if self.with_hessians:
                    self.accumulators[name].add(columns)
                self.counts[name] += columns.shape[2]
                stride = max(1, columns.shape[2] // share)
                self.parts[name].append(columns[0].t()[::stride].float())

    def kept(self) -> dict[str, Tensor]:
        """(N, D) each; no tokens where none were collected."""
        return {
            name: torch.cat(parts) if parts else self._nothing(name)
            for name, parts in self.parts.items()
        }

    def hessians(self) -> dict[str, Tensor]:
        """2 X X^T (D, D) each; (0, D) where the method does not read it."""
        return {
            name: accumulator.hessian()[0] if accumulator.tokens else self._nothing(name)
            for name, accumulator in self.accumulators.items()
        }

    def _nothing(self, name: str) -> Tensor:
        return torch.empty(0, weight_matrix(self.layers[name]).shape[2])

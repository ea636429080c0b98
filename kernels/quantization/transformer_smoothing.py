"""Smoothing of a transformer: where its norms, or linear layers, may give scales to their readers.

Source: G. Xiao et al., "SmoothQuant", ICML 2023, section 4 (every linear layer that a norm feeds;
query, key and value share one input, hence one scale per channel). Which layers a norm feeds is
watched, not looked up (`language.wiring`), so one function serves every architecture.

Pairs go one step further: where linear layer V feeds linear layer O channel by channel (value ->
output of attention, up -> down of a gated or ReLU feed-forward), the rows of V can take the scale
that a norm would. Such pairs are found by trying: another power of two for every channel, which
floating point takes exactly, must leave the block's output bit by bit what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from goldcrest.kernels.language.sequential import Batch, BlockStep, walk
from goldcrest.kernels.language.stacks import LINEAR_TYPES, block_linears, stacks
from goldcrest.kernels.language.wiring import is_norm, shared_inputs
from goldcrest.kernels.quantization.calibration import ChannelMax
from goldcrest.kernels.quantization.smoothing import Consumed, Produced, Settings, rescale, smooth
from goldcrest.kernels.quantization.transformer_inputs import (
    Masks,
    masks_of,
    outside_linears,
    see_block,
    see_outside,
)
from goldcrest.kernels.sparsity.hessian import weight_matrix


def smooth_model(
    model: nn.Module, batches: Sequence[Batch], settings: Settings, *, pairs: bool = False
) -> list[list[str]]:
    """Smooth in place; the model's function stays what it was.

    Returns the groups: maker of the channels first, then the layers that read them. A head that
    shares its weight with the embedding must have been untied.
    """
    masks = [masks_of(model, batch) for batch in batches]
    done: list[list[str]] = []
    for step in walk(model, batches):
        name, block = step.block.name, step.block.module
        run = functools.partial(step.run, 0)
        groups = [
            [group.norm, *group.layers]
            for group in shared_inputs(block, run, name)
            if group.norm is not None
        ]
        if pairs:
            found = linear_pairs(block, run)
            groups += [[f"{name}.{each}" for each in pair] for pair in found]
        for group in groups:
            largest = _largest_inputs(step, masks, group[1])
            _smooth_group(model, group, largest, settings)
        done += groups
    smoothed = {layer for group in done for layer in group[1:]}
    return done + _smooth_outside(model, batches, masks, settings, smoothed)


def _largest_inputs(step: BlockStep, masks: Sequence[Masks], layer: str) -> Tensor:
    """max |x| of each channel (D,) that the named layer of a block reads."""
    largest = ChannelMax()

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        if name == layer:
            largest.observe(x)

    see_block(step, masks, see)
    return largest.largest()


def _smooth_outside(
    model: nn.Module,
    batches: Sequence[Batch],
    masks: Sequence[Masks],
    settings: Settings,
    smoothed: Collection[str],
) -> list[list[str]]:
    """What norms outside of the blocks feed: the head by the last norm, and by the encoder's last
    one the keys and values of all cross attentions, a group over all blocks of the decoder.
    """
    inside = [each for each in block_linears(model) if each not in smoothed]
    watched = [*outside_linears(model), *_norms_outside(model), *inside]
    members = nn.ModuleDict({str(place): model.get_submodule(n) for place, n in enumerate(watched)})

    def run() -> Tensor:
        with torch.no_grad():
            output = model(**batches[0])
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits

    done = []
    for group in shared_inputs(members, run):
        if group.norm is None:
            continue
        names = [watched[int(each)] for each in (group.norm, *group.layers)]
        largest = ChannelMax()

        def see(_: str, __: nn.Module, x: Tensor, largest: ChannelMax = largest) -> None:
            largest.observe(x)

        # A block reads none but the encoder's states from outside.
        read = [(mask.encoder if names[1] in inside else mask.decoder) for mask in masks]
        see_outside(model, names[1:2], batches, read, see)
        _smooth_group(model, names, largest.largest(), settings)
        done.append(names)
    return done


def _norms_outside(model: nn.Module) -> list[str]:
    blocks = tuple(f"{block.name}." for stack in stacks(model) for block in stack.blocks)
    return [
        name
        for name, module in model.named_modules()
        if is_norm(module) and not name.startswith(blocks)
    ]


def _smooth_group(
    model: nn.Module, names: Sequence[str], largest: Tensor, settings: Settings
) -> None:
    """Smooth what the first layer named gives and the others read."""
    maker, *readers = (model.get_submodule(name) for name in names)
    width = largest.numel()
    smooth(
        [Produced(layer=maker, start=0, stop=width)],
        [Consumed(layer=each, start=0, stop=width) for each in readers],  # type: ignore[arg-type]
        largest,
        settings,
    )


@torch.no_grad()
def linear_pairs(block: nn.Module, run: Callable[[], Tensor]) -> list[list[str]]:
    """Pairs of linear layers in `block` whose channels meet one to one, maker first.

    `run` calls the block once on real inputs, in eval mode, and gives its output.
    """
    layers = {name: each for name, each in block.named_modules() if isinstance(each, LINEAR_TYPES)}
    expected = run()
    found = []
    for reader, reading in layers.items():
        width = weight_matrix(reading).shape[2]
        for maker, making in layers.items():
            fits = maker != reader and weight_matrix(making).shape[1] == width
            if fits and _factors_cancel(making, reading, width, run, expected):
                found.append([maker, reader])
                break
    return found


def _factors_cancel(
    maker: nn.Module, reader: nn.Module, width: int, run: Callable[[], Tensor], expected: Tensor
) -> bool:
    """Whether channels may be scaled by 1/2, 1 and 2 on one side and back on the other."""
    factors = torch.tensor([0.5, 1.0, 2.0])[torch.arange(width) % 3]

    def scale(by: Tensor) -> None:
        produced = Produced(layer=maker, start=0, stop=width)
        consumed = Consumed(layer=reader, start=0, stop=width)  # type: ignore[arg-type]
        rescale([produced], [consumed], by)

    scale(factors)
    try:
        return torch.equal(run(), expected)
    finally:
        scale(1 / factors)

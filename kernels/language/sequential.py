"""Calibration block after block: memory for the activations of one block, not of the model.

Sources: E. Frantar, D. Alistarh, "SparseGPT", ICML 2023, section 4; E. Frantar et al., "GPTQ", ICLR
2023, section 4 (blocks in order, each fed by the compressed blocks before it).

    for step in walk(model, batches):        # every block of every stack, in order
        ...step.run(index)...                # its outputs for batch `index`, hooks see its inputs
        ...change step.block.module...
                                             # the next block is fed by the changed one

Per stack the model runs once to learn how each block is called (masks, positions, encoder states:
shared between blocks, so kept once) and what the first block is fed; from there only blocks run. A
decoder's stack is entered after the encoder's blocks were changed, so it sees their new outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goldcrest.kernels.language.offloading import Device, Visits
from goldcrest.kernels.language.stacks import Block, Stack, stacks

Batch = Mapping[str, Any]
"""Keyword arguments of the model: input_ids, attention_mask, labels or decoder_input_ids, ..."""


class _Enough(Exception):  # noqa: N818 - not an error: ends a forward pass that has told enough
    """The last block of the stack was called."""


@dataclass(frozen=True)
class Call:
    """How a block was called, apart from the hidden states that come first."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


class BlockStep:
    """One block with its calibration inputs."""

    def __init__(
        self, stack: Stack, block: Block, hidden: list[Tensor], calls: Sequence[Call]
    ) -> None:
        self.stack, self.block = stack, block
        self.hidden = hidden
        self._calls = calls

    def __len__(self) -> int:
        """Calibration batches."""
        return len(self.hidden)

    def beside(self, index: int) -> list[Tensor]:
        """Tensors that the block is given beside its hidden states: masks, an encoder's states."""
        call = self._calls[index]
        given = (*call.arguments, *call.keywords.values())
        return [each for each in given if isinstance(each, Tensor)]

    def run(
        self,
        index: int,
        hidden: Tensor | None = None,
        module: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The block's output hidden states (B, T, D) for batch `index`, its weights as they are.

        `hidden` replaces the block's inputs, `module` is called in place of the block (the block
        with other weights, say). Gradients flow where the caller lets them.
        """
        call = self._calls[index]
        given = self.hidden[index] if hidden is None else hidden
        output = (module or self.block.module)(given, *call.arguments, **call.keywords)
        return output if isinstance(output, Tensor) else output[0]


def walk(
    model: nn.Module, batches: Sequence[Batch], device: Device | None = None
) -> Iterator[BlockStep]:
    """Every block of the model with its inputs; the next one is fed by what this one has become.

    With a `device` blocks compute there, one at a time (`offloading`): the block of a step is on it
    while the step lasts. What the step holds, and what `run` gives, stays on the model's own.

    The model runs in eval mode without gradients and returns in the mode it came in. Raises
    ValueError where there are no batches, or where a stack is not reached by them.
    """
    if not batches:
        raise ValueError("no calibration batches: give at least one")
    was_training = model.training
    model.eval()
    try:
        found = stacks(model)
        with _visits(found, device) as visits:
            for stack in found:
                hidden, calls = enter(model, stack, batches)
                for place, block in enumerate(stack.blocks):
                    step = BlockStep(stack, block, hidden, [each[place] for each in calls])
                    with visits.staying(block.module):
                        yield step
                        with torch.no_grad():
                            hidden = [step.run(index) for index in range(len(batches))]
    finally:
        model.train(was_training)


def _visits(found: Sequence[Stack], device: Device | None) -> Visits:
    blocks = [block.module for stack in found for block in stack.blocks]
    return Visits(blocks, next(blocks[0].parameters()).device if device is None else device)


def enter(
    model: nn.Module, stack: Stack, batches: Iterable[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What the stack's first block is fed, and how each block is called, batch by batch.

    The model, which must be in eval mode, runs as it is now, up to the stack's last block. Raises
    ValueError where a batch does not reach it.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    for batch in batches:
        fed, called = _one_pass(model, stack, batch)
        if len(called) < len(stack.blocks):
            raise ValueError(
                f"the calibration batches reach {len(called)} of the {len(stack.blocks)} blocks of "
                f"'{stack.name}'"
            )
        hidden.append(fed)
        calls.append(called)
    return hidden, calls


def _one_pass(model: nn.Module, stack: Stack, batch: Batch) -> tuple[Tensor, list[Call]]:
    """Run the model up to the stack's last block."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def told(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        fed = arguments[0] if arguments else keywords.pop("hidden_states")
        if not first:
            first.append(fed.detach())
        calls.append(Call(tuple(arguments[1:]), keywords))
        if len(calls) == len(stack.blocks):
            raise _Enough

    handles = [  # first of all hooks: what a block is given before it goes to another device
        block.module.register_forward_pre_hook(told, with_kwargs=True, prepend=True)
        for block in stack.blocks
    ]
    try:
        with torch.no_grad():
            model(**{"use_cache": False, **batch} if _caches(model) else batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return (first[0] if first else torch.empty(0)), calls


def _caches(model: nn.Module) -> bool:
    """Whether the model would fill a cache of keys and values, which replays must not grow."""
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


def rows_of(step: BlockStep, layer: nn.Module, index: int) -> Tensor:
    """The inputs (B, T, D) of a linear layer of the block for one batch."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        with torch.no_grad():
            step.run(index)
    finally:
        handle.remove()
    return seen[0]


def calibration(
    step: BlockStep, masks: Sequence[Tensor | None]
) -> Callable[[nn.Module], Iterator[Tensor | None]]:
    """A step as a `sparsity.model.Calibration` of its block: runs batches, yields token masks.

    `masks` are token masks (B, T) by batch, True on tokens: padding must not enter a Hessian.
    """

    def calibrate(_: nn.Module) -> Iterator[Tensor | None]:
        for index, mask in enumerate(masks):
            step.run(index)
            yield mask

    return calibrate

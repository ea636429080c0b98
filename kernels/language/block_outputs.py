"""Outputs of every block of a transformer, and which of their tokens are real.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3: f^l is the output of block l, for all blocks of encoder and decoder.

Taken by hooks on the blocks themselves: the library's `hidden_states` end with the output of the
last norm instead of the last block's, and a pattern of names misses blocks that it did not foresee.

B batch   T tokens   D features
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from goldcrest.kernels.language.stacks import Stack, stacks


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each forward pass of the model appends its blocks' outputs (B, T, D), in order.

    Gradients flow through them, also under activation checkpointing: what a block is computed
    again for in the backward pass is no longer recorded once the context has ended.
    """
    outputs: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    blocks = [block.module for stack in stacks(model) for block in stack.blocks]
    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def is_encoder(model: Any, stack: Stack) -> bool:
    """Whether the stack is the encoder of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        return False
    inside = set(model.get_encoder().modules())
    return all(block.module in inside for block in stack.blocks)


def block_masks(model: nn.Module, source: Tensor | None, target: Tensor | None) -> list[Any]:
    """The token mask of every block, in the order of `recorded_outputs`.

    `source` (B, S) is of the encoder's blocks, `target` (B, T) of a decoder's and of a model that
    has one stack only; None: all tokens are real.
    """
    return [
        source if is_encoder(model, stack) else target
        for stack in stacks(model)
        for _ in stack.blocks
    ]

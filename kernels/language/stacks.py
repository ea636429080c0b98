"""The stacks of blocks that a transformer is made of, whatever its architecture.

A stack is an outermost `nn.ModuleList` whose entries hold linear layers: `model.layers` of Llama,
`transformer.h` of GPT-2, `encoder.block` and `decoder.block` of T5, `encoder.layer` of BERT. Names
are those of the architecture; no table of architectures has to be kept.

Linear layers outside of blocks (embeddings, the head) are left to whoever wants them: pruning and
4-bit quantization leave them alone (spec "sparse fine-tuning", section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)
"""Layers that multiply by a matrix; GPT-2's `Conv1D` stores it transposed."""

OUTSIDE_SHARE = 0.1
"""Of a block's weights, what may lie outside of linear layers. Convolutions and tables of relative
positions stay below, experts make up more than half (counted over the library's architectures)."""


@dataclass(frozen=True)
class Block:
    """One transformer block: its name in the model, and the module."""

    name: str
    module: nn.Module

    def linears(self) -> list[str]:
        """Full names of the linear layers inside, in module order."""
        return [
            f"{self.name}.{name}"
            for name, module in self.module.named_modules()
            if isinstance(module, LINEAR_TYPES)
        ]


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another: the encoder, the decoder, or the whole of a causal model."""

    name: str
    blocks: tuple[Block, ...]


def stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks in module order, an encoder before its decoder.

    Raises ValueError for a model without one, naming its class.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in found)
        if isinstance(module, nn.ModuleList) and not inside and _holds_linears(module):
            blocks = tuple(Block(f"{name}.{index}", each) for index, each in enumerate(module))
            found.append(Stack(name, blocks))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with linear layers: not a transformer "
            "that can be compressed block by block"
        )
    return found


def block_linears(model: nn.Module) -> list[str]:
    """Names of every linear layer inside the model's blocks, stack by stack."""
    return [name for stack in stacks(model) for block in stack.blocks for name in block.linears()]


def check_compressible(model: nn.Module) -> None:
    """Raise ValueError for a model that would be compressed in part, or by the wrong inputs.

    The library keeps a mixture's experts as tensors of three axes: pruning and quantization would
    pass them by, and yet report the sparsity and the bits of what little they reached. Where one
    block serves as several layers (ALBERT), calibration would see the first of its uses only.
    """
    total, outside = 0, {}
    found = stacks(model)
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    blocks = max(len(stack.blocks) for stack in found)
    if isinstance(layers, int) and layers > blocks:
        raise ValueError(
            f"{type(model).__name__} has {layers} layers of {blocks} blocks of weights: blocks "
            "that serve more than once can't be compressed, take a model whose layers have their "
            "own"
        )
    for stack in found:
        for block in stack.blocks:
            linears = [each for each in block.module.modules() if isinstance(each, LINEAR_TYPES)]
            inside = {id(value) for each in linears for value in each.parameters()}
            for name, value in block.module.named_parameters():
                if value.ndim >= 2:  # a matrix or more: no bias, no gain
                    total += value.numel()
                    if id(value) not in inside:
                        outside[f"{block.name}.{name}"] = value.numel()
    share = sum(outside.values()) / max(total, 1)
    if share > OUTSIDE_SHARE:
        largest = sorted(outside, key=lambda name: -outside[name])
        more = f" and {len(largest) - 2} more" if len(largest) > 2 else ""
        raise ValueError(
            f"{type(model).__name__} keeps {share:.0%} of its blocks' weights outside of linear "
            f"layers ({', '.join(largest[:2])}{more}), where pruning and quantization do not reach "
            "them: mixtures of experts can't be compressed, take a model without experts"
        )


def _holds_linears(modules: nn.ModuleList) -> bool:
    """Whether every entry holds a linear layer: a list of norms or of convolutions is no stack."""
    return len(modules) > 0 and all(
        any(isinstance(each, LINEAR_TYPES) for each in entry.modules()) for entry in modules
    )

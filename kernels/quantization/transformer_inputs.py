"""What the layers of a transformer read on calibration batches, padding left out.

A padded token tells nothing about the tokens to come, but its activations may be the largest of
all, so it must not enter a range, a moment or a Hessian. Which mask belongs to a layer's input
depends on where the input comes from: a decoder's cross attention reads the encoder's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from goldcrest.kernels.language.sequential import Batch, BlockStep
from goldcrest.kernels.language.stacks import LINEAR_TYPES, block_linears, stacks
from goldcrest.kernels.quantization.int8_attention import AttentionObserver, AttentionShape

Seen = TypeVar("Seen", bound=AttentionShape)
See = Callable[[str, nn.Module, Tensor], None]
"""(layer's full name, layer, the real tokens that it reads (N, D))."""


@dataclass(frozen=True)
class Masks:
    """Masks (B, T) of one batch, True on real tokens; None where nothing is padded or known."""

    encoder: Tensor | None  # the tokens of the first stack
    decoder: Tensor | None  # those of the last one, the same of a model with one stack
    encoder_stack: str  # name of the first stack


def masks_of(model: nn.Module, batch: Batch) -> Masks:
    """The masks of a batch: `attention_mask`, and of a decoder its own mask or its labels."""
    stack = stacks(model)[0].name
    first = _two_dimensional(batch.get("attention_mask"))
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Masks(first, first, stack)
    second = _two_dimensional(batch.get("decoder_attention_mask"))
    labels = batch.get("labels")
    if second is None and isinstance(labels, Tensor):
        second = labels != -100
    return Masks(first, second, stack)


def _two_dimensional(mask: Any) -> Tensor | None:
    """A token mask from (B, T), or from (B, 1, T, T), where a real token sees itself."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:
        mask = mask[:, 0].diagonal(dim1=1, dim2=2)
        return mask if mask.dtype == torch.bool else mask >= 0
    return mask != 0 if mask.ndim == 2 else None


def outside_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers outside of all blocks: the head, poolers, transforms."""
    inside = set(block_linears(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name not in inside
    ]


def see_block(step: BlockStep, masks: Sequence[Masks], see: See) -> None:
    """Run every batch through a block and show what its linear layers read.

    Attention modules with an `AttentionObserver` (`observed`) are told which tokens are real.
    """
    given: set[int] = set()  # where the tensors lie that the block was called with
    block = step.block

    def enter(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        given.clear()
        tensors = [*arguments[1:], *keywords.values()]
        given.update(each.data_ptr() for each in tensors if isinstance(each, Tensor))

    handle = block.module.register_forward_pre_hook(enter, with_kwargs=True)
    names = {name: name.removeprefix(f"{block.name}.") for name in block.linears()}
    layers = {name: block.module.get_submodule(short) for name, short in names.items()}
    try:
        for index, mask in enumerate(masks):
            own = mask.encoder if step.stack.name == mask.encoder_stack else mask.decoder

            def read(
                x: Tensor, own: Tensor | None = own, encoder: Tensor | None = mask.encoder
            ) -> Tensor | None:
                return encoder if x.data_ptr() in given else own

            def look(name: str, layer: nn.Module, x: Tensor, read: Any = read) -> None:
                see(name, layer, _real(x, read(x)))

            with _inputs(layers, look), _masked(block.module, own, read), torch.no_grad():
                step.run(index)
    finally:
        handle.remove()


def see_outside(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    masks: Sequence[Tensor | None],
    see: See,
) -> None:
    """Run the whole model on every batch and show what the named layers read.

    `masks` are those of their inputs: of the decoder's tokens for layers outside of blocks.
    """
    layers = {name: model.get_submodule(name) for name in names}
    for batch, mask in zip(batches, masks, strict=True):

        def look(name: str, layer: nn.Module, x: Tensor, mask: Tensor | None = mask) -> None:
            see(name, layer, _real(x, mask))

        with _inputs(layers, look), torch.no_grad():
            model(**batch)


@contextmanager
def _masked(
    block: nn.Module, own: Tensor | None, read: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """While inside, observers know the real tokens: queries are the block's own, keys come from the
    states (B, S, C) that the attention is called with beside its input, or from the input too."""

    def enter(module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        others = [*arguments[1:], *keywords.values()]
        states = [x for x in others if isinstance(x, Tensor) and x.ndim == 3]
        masks = [mask for mask in map(read, states) if mask is not own]
        module.int8.real(own, masks[0] if masks else own)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True)
        for module in block.modules()
        if isinstance(getattr(module, "int8", None), AttentionObserver)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs(layers: Mapping[str, nn.Module], look: See) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, arguments: look(name, layer, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (N, D) of (B, T, D), or of (B T, D) as OPT's fc1 reads it, that the mask, if it is
    one of them, calls real."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or tuple(x.shape[:-1]) not in (tuple(mask.shape), (mask.numel(),)):
        return rows
    return rows[mask.reshape(-1)]


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], share: float | None = None
) -> Iterator[dict[str, AttentionObserver]]:
    """Observers of the attention modules given, which must compute through `int8_attention`.

    `share` is that of `AttentionObserver`.
    """
    with _shown_to(modules, lambda: AttentionObserver(share)) as observers:
        yield observers


@contextmanager
def _shown_to(
    modules: Mapping[str, nn.Module], make: Callable[[], Seen]
) -> Iterator[dict[str, Seen]]:
    observers = {name: make() for name in modules}
    for name, module in modules.items():
        module.int8 = observers[name]  # type: ignore[assignment]
    try:
        yield observers
    finally:
        for module in modules.values():
            del module.int8


def attention_names(model: nn.Module, batch: Batch) -> list[str]:
    """Names of the modules that call `int8_attention.attention` on this batch, in module order.

    Model and batch may lie on "meta": shapes are looked at, no values.
    """
    candidates = {name: each for name, each in model.named_modules() if name and _composed(each)}
    with _shown_to(candidates, AttentionShape) as observers, torch.no_grad():
        model(**batch)
    return [name for name, observer in observers.items() if observer.shape != (0, 0)]


def _composed(module: nn.Module) -> bool:
    return next(module.children(), None) is not None

"""Which linear layers read one tensor, and which norm made it, found by watching a forward pass.

Smoothing and AWQ divide an input by a scale per channel and multiply the weights that read it: they
need all readers of a tensor, and its maker, if that is a norm whose gain can take the division
(spec "sparse fine-tuning", section 3.4 a; spec "INT4", section 3.4). An architecture's names would
tell too, one table each; tensors tell for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.language.stacks import LINEAR_TYPES


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read one tensor; `norm` made it, if a norm with a gain did.

    `norm` is None too where something else than these layers reads the norm's output (a residual
    sum, as in BERT) or where its gain is not a plain factor: then it can't take a division.
    """

    layers: tuple[str, ...]
    norm: str | None


class _Watch:
    """The tensors that layers take and give, kept alive so that no address is used twice."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.readers: dict[tuple[int, torch.Size], list[str]] = {}
        self.makers: dict[tuple[int, torch.Size], str] = {}

    def reads(self, name: str, x: Tensor) -> None:
        self.kept.append(x)
        readers = self.readers.setdefault((x.data_ptr(), x.shape), [])
        if name not in readers:
            readers.append(name)

    def makes(self, name: str, y: Tensor) -> None:
        self.kept.append(y)
        self.makers[(y.data_ptr(), y.shape)] = name


def is_norm(module: nn.Module) -> bool:
    """Whether a leaf normalises features with a gain (D,): LayerNorm, RMSNorm and their kin."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.ndim == 1


def shared_inputs(block: nn.Module, run: Callable[[], Tensor], name: str = "") -> list[SharedInput]:
    """Linear layers of `block` by the tensor they read, in module order.

    Args:
        block: a block, or a whole model, in eval mode.
        run: calls the block once on real inputs and gives its output.
        name: put before the names, "model.layers.0" for a block of that name.

    A layer that runs twice, on different tensors, joins the groups of both. That a norm's gain can
    be moved into its readers is tried, not guessed: by a factor of 2, which float takes exactly.
    """
    watch = _Watch()
    handles = []
    for child, module in block.named_modules():
        if isinstance(module, LINEAR_TYPES):
            handles.append(module.register_forward_pre_hook(_reader(watch, child)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(_maker(watch, child)))
    try:
        with torch.no_grad():
            expected = run()
    finally:
        for handle in handles:
            handle.remove()
    prefix = f"{name}." if name else ""
    found = []
    for group in _groups(watch):
        foldable = group.norm is not None and _moves(block, group, run, expected)
        checked = group if foldable else replace(group, norm=None)
        found.append(
            SharedInput(
                tuple(prefix + each for each in checked.layers),
                None if checked.norm is None else prefix + checked.norm,
            )
        )
    return found


@torch.no_grad()
def linear_makers(
    block: nn.Module, groups: Sequence[SharedInput], run: Callable[[], Tensor], name: str = ""
) -> dict[SharedInput, str]:
    """The linear layer that can take the division of each group without a norm, where one can.

    That is a layer whose outputs reach the readers with nothing but sums over tokens, products and
    the like in between: v before o (as many key heads as query heads), up before down, a layer
    before ReLU. Tried, not guessed: rows of the layer times 1, 2 or 4, columns of its readers
    divided alike, which float takes exactly, must leave the block's output as it is, to the bit.

    `block`, `run` and `name` are those of `shared_inputs`, which found the groups.
    """
    prefix = f"{name}." if name else ""
    linears = {
        prefix + child: module
        for child, module in block.named_modules()
        if isinstance(module, LINEAR_TYPES)
    }
    expected = run()
    found = {}
    for group in groups:
        if group.norm is None:
            readers = [linears[each] for each in group.layers]
            width = _matrix(readers[0]).shape[1]
            for maker, module in linears.items():
                fits = maker not in group.layers and _matrix(module).shape[0] == width
                if fits and _takes(module, readers, run, expected):
                    found[group] = maker
                    break
    return found


def _takes(
    maker: nn.Module, readers: Sequence[nn.Module], run: Callable[[], Tensor], expected: Tensor
) -> bool:
    """Whether rows of the maker times 1, 2 or 4, columns of readers over it, change nothing."""
    factors = 2.0 ** (torch.arange(len(_matrix(maker)), device=expected.device) % 3)
    bias = getattr(maker, "bias", None)
    _matrix(maker).mul_(factors[:, None])
    if bias is not None:
        bias.mul_(factors)
    for reader in readers:
        _matrix(reader).div_(factors)
    try:
        return torch.equal(run(), expected)
    finally:
        _matrix(maker).div_(factors[:, None])
        if bias is not None:
            bias.div_(factors)
        for reader in readers:
            _matrix(reader).mul_(factors)


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as (outputs, inputs), a view."""
    weight = layer.get_parameter("weight").data
    return weight.t() if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def _moves(
    block: nn.Module, group: SharedInput, run: Callable[[], Tensor], expected: Tensor
) -> bool:
    """Whether halving the readers' weights and doubling the norm's gain changes nothing."""
    assert group.norm is not None
    norm = block.get_submodule(group.norm)
    gains = [each for name, each in norm.named_parameters() if name in ("weight", "bias")]
    weights = [block.get_parameter(f"{each}.weight") for each in group.layers]
    for factor, tensors in ((2.0, gains), (0.5, weights)):
        for each in tensors:
            each.mul_(factor)
    try:
        return torch.equal(run(), expected)
    finally:
        for factor, tensors in ((0.5, gains), (2.0, weights)):
            for each in tensors:
                each.mul_(factor)


def _reader(watch: _Watch, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, arguments: watch.reads(name, arguments[0])


def _maker(watch: _Watch, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda _, arguments, output: watch.makes(name, output)


def _groups(watch: _Watch) -> list[SharedInput]:
    """One group per tensor; groups with a layer in common are one."""
    joined: list[tuple[list[str], set[str | None]]] = []
    for key, readers in watch.readers.items():
        layers, norm = list(readers), watch.makers.get(key)
        for group, norms in joined:
            if set(group) & set(layers):
                group.extend(each for each in layers if each not in group)
                norms.add(norm)
                break
        else:
            joined.append((layers, {norm}))
    return [
        SharedInput(tuple(layers), next(iter(norms)) if len(norms) == 1 else None)
        for layers, norms in joined
    ]

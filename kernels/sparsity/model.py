"""Pruning of a model, layer after layer, and step by step to higher levels.

Sources: E. Frantar, D. Alistarh, "SparseGPT", ICML 2023, section 4 (layers in order, inputs from
the pruned layers before); E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of
Large Language Models", arXiv 2310.06927, section 3 (prune, fine-tune, prune further).

A calibration is a function that runs batches through the model as it is at that moment and yields
each batch's frame mask (B, T) after the batch, or None if nothing is padded:

    def calibrate(model):
        for features, lengths in batches:
            model(features, lengths)
            yield frame_mask(lengths)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goldcrest.kernels import sparsity as family
from goldcrest.kernels.sparsity.hessian import (
    LAYER_TYPES,
    HessianAccumulator,
    Layer,
    layer_inputs,
    like_weight,
    weight_matrix,
)
from goldcrest.kernels.sparsity.masks import Masks

Calibration = Callable[[nn.Module], Iterable[Tensor | None]]
"""Runs calibration batches through a model, yielding the frame mask of each."""


def prunable(model: nn.Module, skip: Iterable[str] = ()) -> list[str]:
    """Names of the linear and convolution layers in module order, those in `skip` left out.

    A name in `skip` also leaves out everything below it. Raises ValueError for one that leaves
    nothing out, with the nearest names that would.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)]
    return left_out(layers, skip)


def left_out(layers: Sequence[str], skip: Iterable[str]) -> list[str]:
    """The layers' names without those at or below a name in `skip`; errors as `prunable`'s."""
    skipped = tuple(skip)
    for item in skipped:
        if not any(_at_or_below(name, item) for name in layers):
            raise ValueError(
                f"no layer is called '{item}' or lies below it{_nearest(item, layers)}"
            )
    return [name for name in layers if not any(_at_or_below(name, item) for item in skipped)]


def _at_or_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _nearest(name: str, layers: Sequence[str]) -> str:
    """The layers and modules above them that are called nearly so, else all layers there are."""
    known = dict.fromkeys(
        ".".join(parts[:depth])
        for parts in (layer.split(".") for layer in layers)
        for depth in range(1, len(parts) + 1)
    )
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(repr(each) for each in near)}?"
    return f"; layers: {', '.join(layers)}"


@contextmanager
def _recorded_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs of the named layers as they come, until the caller empties the lists."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        _layer(model, name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs[name].append(arguments[0].detach())
        )
        for name in names
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def layer_columns(
    model: nn.Module, names: Sequence[str], calibrate: Calibration
) -> Iterator[tuple[str, Tensor]]:
    """Each calibration batch's inputs of each named layer, unfolded to (G, D, N)."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _recorded_inputs(model, names) as inputs:
            for mask in calibrate(model):
                for name in names:
                    for x in inputs[name]:
                        yield name, layer_inputs(_layer(model, name), x, mask)
                    inputs[name].clear()
    finally:
        model.train(was_training)


def hessians(
    model: nn.Module,
    names: Sequence[str],
    calibrate: Calibration,
    *,
    within: str = "",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """H = 2 X X^T (G, D, D) of each named layer under the calibration batches.

    `within` begins the layers' names in errors, where `model` is a part of another ("layers.0.");
    `dtype` is what H is summed in. Raises ValueError naming a layer that no input reached, or
    whose inputs are not finite.
    """
    sums = {name: HessianAccumulator(dtype) for name in names}
    for name, columns in layer_columns(model, names, calibrate):
        with told_of(within + name):
            sums[name].add(columns)
    for name, accumulator in sums.items():
        if accumulator.tokens == 0:
            raise ValueError(
                f"no calibration inputs reached layer '{within}{name}': leave it out by 'skip', or "
                "calibrate on rows that it reads"
            )
    return {name: accumulator.hessian() for name, accumulator in sums.items()}


@contextmanager
def told_of(layer: str) -> Iterator[None]:
    """A ValueError inside names the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer '{layer}': {error}") from error


def prune_model(
    model: nn.Module,
    names: Sequence[str | Sequence[str]],
    calibrate: Calibration,
    method: str,
    sparsity: float,
    settings: Any,
) -> Masks:
    """Prune the named layers of `model` in place, in the order given.

    Args:
        model: any module; it runs in eval mode and returns in the mode it came in.
        names: layers, or groups of layers that share one calibration pass (cheaper: the inputs of
            a group's later layers do not see the group's own pruning).
        calibrate: runs the calibration batches; called once per entry of `names`.
        method: a file of this folder.
        sparsity: share of zeros of every layer (of all together, under a global method).
        settings: the method's `Settings`.

    Returns:
        masks by layer name, in the shapes of the layers' weights.

    Raises:
        ValueError: an unknown method, a bad sparsity, a layer that no input reached.
    """
    rule = family.load(method)
    groups = [[entry] if isinstance(entry, str) else list(entry) for entry in names]
    flat = [name for group in groups for name in group]
    shares = dict.fromkeys(flat, sparsity)
    if hasattr(rule, "layer_sparsities"):
        weights = {name: weight_matrix(_layer(model, name)) for name in flat}
        shares = rule.layer_sparsities(weights, sparsity, settings)
    masks: Masks = {}
    for group in groups:
        found = hessians(model, group, calibrate)
        for name in group:
            masks[name] = prune_layer(
                _layer(model, name), found[name], rule, shares[name], settings
            )
    return masks


def prune_layer(
    layer: Layer, hessian: Tensor, rule: family.PruningMethod, sparsity: float, settings: Any
) -> Tensor:
    """Prune one layer in place by its H (G, D, D); returns the mask in the weight's shape."""
    pairs = [
        rule.prune(weight, each, sparsity=sparsity, settings=settings)
        for weight, each in zip(weight_matrix(layer), hessian, strict=True)
    ]
    with torch.no_grad():
        layer.weight.copy_(like_weight(layer, torch.stack([pair[0] for pair in pairs])))
    return like_weight(layer, torch.stack([pair[1] for pair in pairs]))


COMPRESSION_FACTORS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
"""Compression of the study's gradual recipe for T5 and Whisper (its section 4)."""


def gradual_levels(factors: Sequence[float] = COMPRESSION_FACTORS) -> list[float]:
    """Sparsity 1 - 1/c of each compression factor c.

    Raises ValueError unless the factors are above 1 and rise.
    """
    rising = all(low < high for low, high in itertools.pairwise(factors))
    if not factors or min(factors) <= 1 or not rising:
        raise ValueError(f"compression factors must rise and be above 1, not {list(factors)}")
    return [1 - 1 / factor for factor in factors]


def gradual(
    model: nn.Module,
    names: Sequence[str | Sequence[str]],
    calibrate: Calibration,
    method: str,
    levels: Sequence[float],
    settings: Any,
) -> Iterator[tuple[float, Masks]]:
    """Prune to each level in turn; fine-tune the model under the masks before asking for the next.

    Each level prunes the *fine-tuned* model of the level before. Masks nest only under SparseGPT's
    `keep_zeros` or a method without corrections.
    """
    if any(low >= high for low, high in itertools.pairwise(levels)):
        raise ValueError(f"levels must rise, not {list(levels)}")
    for level in levels:
        yield level, prune_model(model, names, calibrate, method, level, settings)


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    if not isinstance(layer, LAYER_TYPES):
        raise ValueError(f"'{name}' is a {type(layer).__name__}, not a linear or convolution layer")
    return layer

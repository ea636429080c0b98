"""Pruning of a transformer in one shot, block after block.

Sources: E. Frantar, D. Alistarh, "SparseGPT", ICML 2023, section 4; E. Kurtic et al., arXiv
2310.06927, section 3 (every linear layer of every block to the same sparsity; embeddings and the
head stay dense).

A block's layers share one pass of calibration, fed by the pruned blocks before it. Padding tokens
never enter a Hessian. In a decoder the keys and values of cross-attention read the *encoder's*
states, whose padding is another: these layers are found by the tensor that they read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from goldcrest.kernels import sparsity as family
from goldcrest.kernels.language.block_outputs import is_encoder
from goldcrest.kernels.language.offloading import Device, moved
from goldcrest.kernels.language.sequential import Batch, BlockStep, calibration, walk
from goldcrest.kernels.language.stacks import block_linears, check_compressible
from goldcrest.kernels.sparsity.hessian import weight_matrix
from goldcrest.kernels.sparsity.masks import Masks
from goldcrest.kernels.sparsity.model import hessians, left_out, prune_layer, told_of

TokenMasks = Sequence[Tensor | None]
"""A token mask (B, T) per calibration batch, True on tokens; None where nothing is padded."""


def prunable_linears(model: nn.Module, skip: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers inside the blocks, without those at or below a name in `skip`.

    Raises ValueError for a name in `skip` that leaves nothing out.
    """
    return left_out(block_linears(model), skip)


def check_prunable(
    model: nn.Module, *, skip: Iterable[str] = (), pattern: Sequence[int] | None = None
) -> list[str]:
    """Names of the linear layers that `prune_blocks` prunes; the model may lie on "meta".

    Raises ValueError for what can be told by the layers alone: a mixture of experts, a name in
    `skip` that leaves nothing out, a pattern of (n zeros, of m) that does not divide the inputs.
    """
    check_compressible(model)
    names = prunable_linears(model, skip)
    if pattern is None:
        return names
    zeros, run = pattern
    widths = {name: weight_matrix(_linear(model, name)).shape[2] for name in names}
    odd = [f"{name} has {width}" for name, width in widths.items() if width % run]
    if odd:
        more = f", and {len(odd) - 3} more layers" if len(odd) > 3 else ""
        raise ValueError(
            f"a pattern of {zeros}:{run} does not divide the inputs of {len(odd)} of {len(names)} "
            f"layers: {', '.join(odd[:3])}{more}; name them in skip, or leave the pattern out"
        )
    return names


def prune_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    source: TokenMasks,
    target: TokenMasks,
    method: str,
    sparsity: float,
    settings: Any,
    skip: Iterable[str] = (),
    device: Device | None = None,
) -> Masks:
    """Prune the model in place.

    Args:
        model: any transformer with stacks of blocks.
        batches: calibration batches, keyword arguments of the model.
        source, target: token masks of the encoder's states and of the decoder's (or only) stack.
        method: a file of kernels/sparsity.
        sparsity: share of zeros of every layer (of all together, under a global method).
        settings: the method's `Settings`.
        skip: layers, or modules above them, that stay dense.
        device: where blocks are run and pruned, one at a time, while the rest stays where it is;
            None: where the model lies. On a GPU a Hessian is summed in float32.

    Returns:
        masks by layer name, in the shapes of the layers' weights, on the model's device.

    Raises:
        ValueError: no batches, an unknown method or layer, a mixture of experts; naming the layer:
            inputs that are not finite or none at all, a pattern that does not divide them.
    """
    rule = family.load(method)
    names = check_prunable(model, skip=skip, pattern=getattr(settings, "pattern", None))
    shares = dict.fromkeys(names, sparsity)
    if hasattr(rule, "layer_sparsities"):
        weights = {name: weight_matrix(_linear(model, name)) for name in names}
        shares = rule.layer_sparsities(weights, sparsity, settings)
    home = next(model.parameters()).device
    masks: Masks = {}
    for step in walk(model, batches, device):
        stack_masks = source if is_encoder(model, step.stack) else target
        inside = [name for name in step.block.linears() if name in shares]
        across = _reads_encoder(step, inside)
        for chosen, token_masks in ((across, source), (set(inside) - across, stack_masks)):
            group = [name for name in inside if name in chosen]
            if group:
                found = _hessians(step, group, token_masks)
                for name in group:
                    layer = _linear(model, name)
                    with told_of(name):
                        mask = prune_layer(layer, found[name], rule, shares[name], settings)
                    masks[name] = moved(mask, home)
    return {name: masks[name] for name in names}


def _hessians(step: BlockStep, names: Sequence[str], masks: TokenMasks) -> dict[str, Tensor]:
    """H of layers of the step's block, by full name, where the block is."""
    prefix = f"{step.block.name}."
    local = [name.removeprefix(prefix) for name in names]
    found = hessians(
        step.block.module,
        local,
        calibration(step, masks),
        within=prefix,
        dtype=_hessian_dtype(next(step.block.module.parameters()).device),
    )
    return {prefix + name: value for name, value in found.items()}


def _hessian_dtype(device: torch.device) -> torch.dtype:
    """float64 on a CPU; most GPUs are slow in it, and float32 without TF32 is enough."""
    return torch.float64 if device.type == "cpu" else torch.float32


def _reads_encoder(step: BlockStep, names: Sequence[str]) -> set[str]:
    """The layers that read a tensor which the block was given beside its hidden states."""
    reading: set[str] = set()
    if all(x.ndim != 3 for x in step.beside(0)):
        return reading
    beside: set[tuple[int, torch.Size]] = set()
    prefix = f"{step.block.name}."

    def called(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        given = (*arguments[1:], *keywords.values())  # where the block is, which may be a GPU
        tensors = [x for x in given if isinstance(x, Tensor) and x.ndim == 3]
        beside.update((x.data_ptr(), x.shape) for x in tensors)

    def told(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if (arguments[0].data_ptr(), arguments[0].shape) in beside:
                reading.add(name)

        return hook

    handles = [step.block.module.register_forward_pre_hook(called, with_kwargs=True)]
    for name in names:
        layer = step.block.module.get_submodule(name.removeprefix(prefix))
        handles.append(layer.register_forward_pre_hook(told(name)))
    try:
        with torch.no_grad():
            step.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return reading


def _linear(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)

"""What loaders of other runtimes expect of the model around its quantized layers.

Sources: transformers (`integrations/awq.py`, `quantizers/quantizer_awq.py`), which vLLM's and
AutoAWQ's loaders resemble; optimum's `GPTQQuantizer`; the GPTQModel project.

A loader replaces layers of the float model, then reads tensors into them. It goes wrong where it
replaces other layers than were quantized, or where the model's code asks a replaced layer for its
float weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels.language.stacks import LINEAR_TYPES, block_linears
from goldcrest.kernels.weight_only.gptq_layout import check_size

Layout = Literal["gptq", "awq"]
"""Layouts of other runtimes."""

_ASKS_FOR_WEIGHT = ("DenseActDense", "DenseGatedActDense")
"""Ends of the names of T5's (and its relatives') feed-forward classes, which read `wo.weight`."""

_SCALED_ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    "bloom": ("gelu_impl", "dense_h_to_4h"),
    "falcon": ("act", "dense_h_to_4h"),
    "gpt_bigcode": ("act", "c_fc"),
    "gpt_neox": ("act", "dense_h_to_4h"),
    "gptj": ("act", "fc_in"),
    "mpt": ("act", "up_proj"),
    "RefinedWebModel": ("act", "dense_h_to_4h"),
    "starcoder2": ("act", "c_fc"),
}
"""By model type: the activation that AWQ loaders give a scale per channel, and the layer before."""


def check_loadable(model: nn.Module, layout: Layout, bits: int, spared: Collection[str]) -> None:
    """Raise ValueError, naming a layer, for a model that no loader of the layout takes.

    `model` is the float one, which may lie on "meta"; `spared` are the layers that stay float.
    """
    for name in block_linears(model):
        if name in spared:
            continue
        layer = model.get_submodule(name)
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if layout == "awq" and isinstance(layer, Conv1D):
            raise ValueError(
                f"loaders of the awq layout replace linear layers; '{name}' is a Conv1D"
            )
        if name.endswith(".wo") and parent.endswith(_ASKS_FOR_WEIGHT):
            raise ValueError(
                f"{parent} asks for the float weight of '{name}', which a layer that a loader of "
                f"the {layout} layout puts there does not have"
            )
        try:
            _check_words(layer, layout, bits)
        except ValueError as error:
            raise ValueError(f"'{name}' does not fit the {layout} layout: {error}") from error


def float_linears(model: nn.Module, quantized: Collection[str], *, blocks: bool) -> list[str]:
    """Linear layers that are not quantized: of the blocks alone, or of the whole model."""
    if blocks:
        names = block_linears(model)
    else:
        names = [n for n, module in model.named_modules() if isinstance(module, LINEAR_TYPES)]
    return sorted(set(names) - set(quantized))


def activation_scales(model: nn.Module) -> dict[str, Tensor]:
    """Scales (d_ff,) of 1, float16, of the activations that AWQ loaders divide by them.

    AWQ may fold scales into an activation where nothing linear stands before a layer; ours never
    does. Loaders look for the tensors all the same.
    """
    found = _SCALED_ACTIVATIONS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if found is None:
        return {}
    activation, before = found
    return {
        f"{name}.{activation}.scales": torch.ones(getattr(module, before).out_features).half()
        for name, module in model.named_modules()
        if hasattr(module, activation) and hasattr(module, before)
    }


def _check_words(layer: nn.Module, layout: Layout, bits: int) -> None:
    """Raise ValueError unless the layer's codes fill words of 32 bits."""
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
    if layout == "gptq":
        check_size(bits, rows, columns)
    elif rows % 8:
        raise ValueError(f"it takes outputs by eights, not {rows}")

"""A quantized model as other runtimes load it: checkpoints in the GPTQ and the AWQ layout.

Sources: the AutoGPTQ and GPTQModel projects (`quantize_config.json`), the AutoAWQ project, and the
`quantization_config` that transformers, vLLM and others read of a model's `config.json`.

Every quantized layer becomes `name.qweight`, `name.qzeros`, `name.scales` (and `name.g_idx`);
everything else keeps its name and numbers. Layers left float are named in the config, or a runtime
would look for their codes (`loaders.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goldcrest.kernels.weight_only import awq_layout, gptq_layout, loaders
from goldcrest.kernels.weight_only.grid import QuantizedWeight
from goldcrest.kernels.weight_only.loaders import Layout
from goldcrest.kernels.weight_only.packing import PARTS, unpack_state

LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
"""A layer's tensors in each."""


def to_checkpoint(
    state: Mapping[str, Tensor], layout: Layout, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the quantization config of a model's state dict.

    Args:
        state: of a model with `WeightOnlyLinear` layers.
        layout: which runtimes are to read it.
        model: the float model, which may lie on "meta": what its loaders start from.

    Raises ValueError for what the layout cannot hold, naming the layer: input scales that are not
    folded, layers of different bits or group sizes, scales beyond float16, and others.
    """
    weights = unpack_state(state)
    if not weights:
        raise ValueError("no layer of the model is quantized")
    # GPTQModel takes "gptq" of symmetric grids alone: writers disagreed on what it makes of the
    # zero points of others, and zero points less 1, as it has them, cannot tell 0.
    symmetric = all(gptq_layout.is_symmetric(weight) for weight in weights.values())
    form: gptq_layout.Format = "gptq" if symmetric else "gptq_v2"
    stored = {f"{name}.{part}" for name in weights for part in PARTS}
    tensors = {name: tensor for name, tensor in state.items() if name not in stored}
    for name, weight in weights.items():
        try:
            made = (
                awq_layout.to_awq(weight) if layout == "awq" else gptq_layout.to_gptq(weight, form)
            )
        except ValueError as error:
            raise ValueError(
                f"'{name}' does not fit the {layout.upper()} layout: {error}"
            ) from error
        tensors.update({f"{name}.{part}": tensor for part, tensor in made.items()})
    config = gptq_layout.quantization_config(list(weights.values()), form)
    spared = loaders.float_linears(model, weights, blocks=layout == "gptq")
    if layout == "gptq":
        return tensors, _gptq(config, sorted(weights), spared)
    return {**tensors, **loaders.activation_scales(model)}, _awq(config, spared)


def from_checkpoint(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The quantized weights of a checkpoint, and its other tensors.

    Raises ValueError for a config of another kind and tensors that do not belong together.
    """
    layout = config.get("quant_method")
    if layout not in LAYOUTS:
        raise ValueError(f"quant_method is '{layout}', not one of {', '.join(LAYOUTS)}")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    rest, weights = dict(tensors), {}
    for name in names:
        parts = {part: rest.pop(f"{name}.{part}") for part in LAYOUTS[layout]
                 if f"{name}.{part}" in rest}  # fmt: skip
        if layout == "awq":
            weights[name] = awq_layout.from_awq(parts, int(config["group_size"]))
        else:
            weights[name] = gptq_layout.from_gptq(
                parts,
                int(config["bits"]),
                int(config["group_size"]),
                config.get("checkpoint_format", "gptq"),  # older writers knew no other
            )
    return weights, rest


def _gptq(
    config: dict[str, Any], quantized: Collection[str], spared: Collection[str]
) -> dict[str, Any]:
    """GPTQModel names the layers of the blocks that are not quantized ("-:" and a regular
    expression), optimum and transformers those that are.
    """
    config = {**config, "lm_head": False}
    if spared:
        config["dynamic"] = {f"-:^{re.escape(name)}$": dict[str, Any]() for name in spared}
        config["modules_in_block_to_quantize"] = [list(quantized)]
    return config


def _awq(config: dict[str, Any], spared: Collection[str]) -> dict[str, Any]:
    """AWQ loaders replace every linear layer of the model that is not named here."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": config["bits"],
        "group_size": config["group_size"],
        "zero_point": not config["sym"],
        "modules_to_not_convert": sorted({*spared, "lm_head"}),
    }


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def quantized_bytes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of the quantized weights of a state dict, headers included, and as float32."""
    headers = [name.removesuffix(".header") for name in state if name.endswith(".header")]
    stored = sum(
        bytes_of({part: state[f"{name}.{part}"]})
        for name in headers
        for part in PARTS
        if f"{name}.{part}" in state
    )
    plain = sum(4 * int(torch.prod(state[f"{name}.header"][2:4])) for name in headers)
    return stored, plain

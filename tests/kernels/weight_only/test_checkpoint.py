"""Whole models in the layouts of other runtimes, read back by code of this test and by our own.

That loaders of the AWQ layout take a folder whole is in `test_awq_loading.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from goldcrest.kernels.weight_only.awq_layout import ORDER
from goldcrest.kernels.weight_only.checkpoint import (
    bytes_of,
    from_checkpoint,
    quantized_bytes,
    to_checkpoint,
)
from goldcrest.kernels.weight_only.grid import GridSettings
from goldcrest.kernels.weight_only.loaders import check_loadable
from goldcrest.kernels.weight_only.transformer import Options, quantize, quantized_layers
from tests.kernels.language import tiny_models

BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HALF = {"group_size": 16, "scale_dtype": "float16"}


def quantized(method: str = "awq", architecture: str = "gpt2", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture]().eval()
    given = [tiny_models.batch(architecture, seed=i) for i in range(2)]
    grid = GridSettings(**{**HALF, **changes})
    quantize(model, given, method=method, grid=grid, options=Options(insert_scales=False),
             high_precision=["transformer.h.1"] if architecture == "gpt2" else [])  # fmt: skip
    return model


def read_gptq(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """A layer's weight (R, D) by shifts, as the loaders of AutoGPTQ and GPTQModel do it."""
    shifts = torch.arange(0, 32, 4)
    codes = (tensors[f"{name}.qweight"][:, None, :] >> shifts[None, :, None]) & 15
    codes = codes.flatten(0, 1)  # (D, R)
    zeros = (tensors[f"{name}.qzeros"][:, :, None] >> shifts) & 15
    zeros = zeros.flatten(1) + (1 if config["checkpoint_format"] == "gptq" else 0)  # (G, R)
    groups = tensors[f"{name}.g_idx"].long()
    scales = tensors[f"{name}.scales"].float()
    return (scales[groups] * (codes - zeros[groups])).t()


def read_awq(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """A layer's weight (R, D) as AutoAWQ unpacks it: shifts in its order of nibbles."""
    shifts = 4 * torch.tensor(ORDER).argsort()
    codes, zeros = (
        ((tensors[f"{name}.{part}"][:, :, None] >> shifts) & 15).flatten(1)
        for part in ("qweight", "qzeros")
    )
    groups = torch.arange(len(codes)) // config["group_size"]
    return (tensors[f"{name}.scales"].float()[groups] * (codes - zeros[groups])).t()


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@pytest.mark.parametrize(("method", "scheme"), [("awq", "asym"), ("gptq", "sym_gptq")])
def test_round_trip_and_a_foreign_reader(layout: Any, method: str, scheme: str) -> None:
    """Through a safetensors file; every weight equals what the model computed with, exactly."""
    model = quantized(method, scheme=scheme)
    layers = quantized_layers(model)
    kept = {f"transformer.h.1.{each}" for each in BLOCK}
    tensors, config = to_checkpoint(dict(model.state_dict()), layout, tiny_models.gpt2())
    tensors = load(save({n: t.clone().contiguous() for n, t in tensors.items()}))
    config = json.loads(json.dumps(config))
    assert config["quant_method"] == layout
    assert config["bits"] == 4
    assert config["group_size"] == 16
    if layout == "gptq":
        assert config["sym"] == (scheme == "sym_gptq")
        # GPTQModel refuses "gptq" of asymmetric grids.
        assert config["checkpoint_format"] == ("gptq" if config["sym"] else "gptq_v2")
        assert {re.sub(r"[-:^$\\]", "", each) for each in config["dynamic"]} == kept
        assert set(config["modules_in_block_to_quantize"][0]) == set(layers)
    else:
        assert config["zero_point"] == (scheme == "asym")
        assert set(kept) < set(config["modules_to_not_convert"])
    reader = read_gptq if layout == "gptq" else read_awq
    weights, rest = from_checkpoint(tensors, config)
    assert set(weights) == set(layers)
    for name, layer in layers.items():
        wanted = layer.quantized().decode()
        assert torch.equal(weights[name].decode(), wanted)
        assert torch.equal(reader(tensors, name, config), wanted)
    plain = {
        n for n in model.state_dict() if not n.startswith(tuple(f"{each}." for each in layers))
    }
    biases = {f"{name}.bias" for name in layers}
    assert set(rest) == plain | biases


def test_what_a_layout_cannot_hold_is_told_with_the_layer() -> None:
    state = dict(quantized().state_dict())
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' does not fit the AWQ"):
        scaled = {**state, "transformer.h.0.attn.c_attn.input_scales": torch.ones(32)}
        to_checkpoint(scaled, "awq", tiny_models.gpt2())
    with pytest.raises(ValueError, match="no layer of the model is quantized"):
        to_checkpoint({"a": torch.ones(2)}, "gptq", tiny_models.gpt2())
    with pytest.raises(ValueError, match="quant_method is 'gguf'"):
        from_checkpoint({}, {"quant_method": "gguf"})


def test_configs_of_older_writers_are_read() -> None:
    """Without `checkpoint_format` it is "gptq"; without layers left float none are named."""
    torch.manual_seed(0)
    model = tiny_models.llama().eval()
    bare = tiny_models.llama()
    given = [tiny_models.batch("llama", seed=0)]
    quantize(model, given, method="rtn", grid=GridSettings(**HALF, scheme="sym"))
    tensors, config = to_checkpoint(dict(model.state_dict()), "gptq", bare)
    assert not {"dynamic", "modules_in_block_to_quantize"} & set(config)
    assert config.pop("checkpoint_format") == "gptq"
    weights, _ = from_checkpoint(tensors, config)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(weights[name].decode(), layer.quantized().decode())


@pytest.mark.parametrize(
    ("architecture", "layout", "bits", "said"),
    [
        ("gpt2", "awq", 4, r"'transformer\.h\.0\.attn\.c_attn' is a Conv1D"),
        ("t5", "awq", 4, r"asks for the float weight of '.*\.wo'"),
        ("t5", "gptq", 4, r"asks for the float weight of '.*\.wo'"),
        ("llama", "gptq", 5, "knows 2, 3, 4 and 8 bits, not 5"),
        (
            "llama",
            "gptq",
            2,
            "'model.layers.0.self_attn.q_proj' does not fit the gptq layout: 12 x",
        ),
        ("llama", "awq", 4, "takes outputs by eights, not 12"),
    ],
)
def test_models_that_no_loader_takes_are_refused(
    architecture: str, layout: Any, bits: int, said: str
) -> None:
    sizes = {"head_dim": 3} if architecture == "llama" else {}
    with torch.device("meta"):
        model = tiny_models.MODELS[architecture](**sizes)
    with pytest.raises(ValueError, match=said):
        check_loadable(model, layout, bits, [])
    every = [n for n, each in model.named_modules() if not list(each.children())]
    check_loadable(model, layout, bits, every)


def test_models_that_loaders_take_pass() -> None:
    for name in ("llama", "opt", "mpt", "bert"):
        for layout in ("gptq", "awq"):
            check_loadable(tiny_models.MODELS[name](), layout, 4, [])  # type: ignore[arg-type]
    check_loadable(tiny_models.gpt2(), "gptq", 4, [])


def test_bytes_of_the_quantized_weights() -> None:
    model = quantized("rtn", scheme="sym")
    stored, plain = quantized_bytes(model.state_dict())
    layers = quantized_layers(model).values()
    assert plain == sum(4 * each.form.rows * each.form.columns for each in layers)
    biases = sum(4 * each.form.rows for each in layers)
    assert stored == sum(bytes_of(dict(each.named_buffers())) for each in layers) - biases

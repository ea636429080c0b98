"""The AWQ layout through transformers' own loader, whose kernels alone are this test's.

The kernels (`gptqmodel`) need a GPU to be built; what decides whether a folder loads is which
layers the loader replaces and which names it looks for, and that is transformers' code.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.quantizers import quantizer_awq

from goldcrest.kernels.language.architectures import auto_class, own_state
from goldcrest.kernels.weight_only.checkpoint import to_checkpoint
from goldcrest.kernels.weight_only.grid import GridSettings
from goldcrest.kernels.weight_only.transformer import Options, quantize
from tests.kernels.language import tiny_models

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, in the order of the outputs


class AwqLinear(nn.Module):
    """A layer that unpacks its codes by shifts, with the buffers of the real ones."""

    def __init__(
        self, *, group_size: int, in_features: int, out_features: int, bias: bool, **_: Any
    ) -> None:
        super().__init__()
        self.group_size = in_features if group_size == -1 else group_size
        self.out_features = out_features
        words, groups = out_features // 8, in_features // self.group_size
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, inputs: Tensor) -> Tensor:
        shifts = 4 * torch.tensor(NIBBLES)
        codes, zeros = (
            ((words[:, :, None] >> shifts) & 15).flatten(1) for words in (self.qweight, self.qzeros)
        )
        groups = torch.arange(len(codes)) // self.group_size
        weight = self.scales.float()[groups] * (codes - zeros[groups])
        return inputs @ weight + (0 if self.bias is None else self.bias)


class ScaledActivation(nn.Module):
    """An activation divided by a scale per channel, as AWQ's project has it."""

    def __init__(self, module: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act, self.scales = module, nn.Parameter(scales)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.act(inputs) / self.scales


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gptqmodel` as far as transformers' loader asks for it."""

    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("gptqmodel")
    module("gptqmodel.quantization", METHOD=Enum("METHOD", ["AWQ", "GPTQ"]))
    module("gptqmodel.quantization.awq")
    module("gptqmodel.quantization.awq.modules")
    module("gptqmodel.quantization.awq.modules.act", ScaledActivation=ScaledActivation)
    module("gptqmodel.utils")
    module("gptqmodel.utils.importer", hf_select_quant_linear_v2=lambda **_: AwqLinear)
    module("gptqmodel.utils.model", hf_gptqmodel_post_init=lambda model, **_: model)
    monkeypatch.setattr(quantizer_awq, "is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(quantizer_awq, "is_accelerate_available", lambda *_: True)


def neox() -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, num_attention_heads=4, **sizes))


MODELS: dict[str, tuple[Any, list[str]]] = {
    "llama": (tiny_models.llama, []),
    "llama, a layer spared": (tiny_models.llama, ["model.layers.1.mlp.up_proj"]),
    "opt": (tiny_models.opt, []),
    "opt with projections": (lambda: tiny_models.opt(word_embed_proj_dim=16), []),
    "mpt": (tiny_models.mpt, []),
    "gpt_neox": (neox, []),
    "bert": (tiny_models.bert, []),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_loads_as_the_model_that_was_found(name: str, tmp_path: Path) -> None:
    """Every tensor finds its place and no layer is replaced that was not quantized."""
    make, spared = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    base = "bert" if name == "bert" else "llama"
    given = [tiny_models.batch(base, seed=i) for i in range(2)]
    given = [
        {k: v for k, v in each.items() if k in ("input_ids", "attention_mask")} for each in given
    ]
    with torch.device("meta"):
        bare = make()
    quantize(
        model, given, method="awq", grid=GridSettings(group_size=16, scale_dtype="float16"),
        options=Options(insert_scales=False, compute="float32"), high_precision=spared,
    )  # fmt: skip
    tensors, config = to_checkpoint(own_state(model), "awq", bare)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    values = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    text = json.dumps({**values, "quantization_config": config}, default=str)
    (tmp_path / "config.json").write_text(text)
    loaded, found = auto_class("masked" if name == "bert" else "causal").from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        ours, theirs = model(**given[0]).logits, loaded.eval()(**given[0]).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)

"""INT8 of every architecture: accuracy, what is skipped, storage, generation with the INT8 cache."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from goldcrest.kernels.quantization.int8_attention import AttentionGrids
from goldcrest.kernels.quantization.int8_cache import Int8CacheLayer, cache_bytes
from goldcrest.kernels.quantization.int8_linear import Int8Embedding, Int8Linear
from goldcrest.kernels.quantization.int8_transformer import Settings, install, quantize, state
from tests.kernels.language import tiny_models

ARCHITECTURES = sorted(tiny_models.MODELS)


def float_model(architecture: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tiny_models.MODELS[architecture]().eval()


def batches(architecture: str, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny_models.batch(architecture, rows=3, seed=seed) for seed in range(count)]


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_logits_stay_close_and_survive_storage(architecture: str, activations: Any) -> None:
    model = float_model(architecture)
    given = batches(architecture)
    unseen = tiny_models.batch(architecture, rows=3, seed=9)
    expected = logits(model, unseen)
    description = json.loads(
        json.dumps(quantize(model, given, Settings(activations=activations)))
    )
    found = logits(model, unseen)
    assert 0 < relative_error(found, expected) < 0.08
    stored = {name: tensor.clone() for name, tensor in state(model, description).items()}
    with torch.device("meta"):
        again = tiny_models.MODELS[architecture]().eval()
    install(again, description)
    for name, buffer in again.named_buffers():
        if name not in again.state_dict():
            again.get_submodule(name.rpartition(".")[0]).register_buffer(
                name.rpartition(".")[2], model.get_buffer(name), persistent=False
            )
    again.load_state_dict(stored, assign=True)
    assert torch.equal(logits(again, unseen), found)

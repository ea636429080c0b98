"""The language pipeline as a user runs it: command line, real Ray, real DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.command_line import goldcrest

pytestmark = (
    pytest.mark.slow
)  # `make test` has a limit of time; its steps are in tests/tasks/language
SMALL = """
corpus: {embedded: {meanings: 60}}
tokenizer: {vocab_size: 300}
tokens: {length: 128}
pretrain_tokens: {length: 128, pack: everything}
pretrain:
  model:
    architecture: llama
    settings: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
               num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 160}
  training: {epochs: 2, batch_size: 8, learning_rate: 0.005, schedule: constant, warmup_steps: 0}
finetune: null
sparse:
  levels: [0.75]
  recipe:
    calibration_rows: 32
    training: {epochs: 1, batch_size: 8, learning_rate: 0.002, schedule: constant, warmup_steps: 0}
int8: {calibration: 32}
int8_of: sparse_75
int4: {methods: {rtn: {}}, group_sizes: [32], evaluation: 16, calibration: 16}
evaluate:
  metrics: [exact_match, bleu]
  examples: 6
  generation: {max_new_tokens: 24}
  bootstrap: 20
  speed: {prompt_tokens: 16, new_tokens: 2, repeats: 1}
"""
COMMAND = ("run", "language", "--config", "small.yaml", "--store", "store", "--no-tracking")
MODELS = {"dense", "sparse_75", "int8", "int4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run was started; its answer is first.json."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "small.yaml").write_text(SMALL)
    goldcrest(*COMMAND, "--json", "first.json", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """What the run said of itself."""
    found: dict[str, Any] = json.loads((folder / "first.json").read_text())
    return found


def test_every_model_has_the_promised_metrics(result: dict[str, Any]) -> None:
    assert (result["pipeline"], result["status"], result["error"]) == (
        "language",
        "succeeded",
        None,
    )
    language, models = result["metrics"]["language"], result["metrics"]["models"]
    assert set(language) == set(models) == MODELS
    for found in language.values():
        assert {"perplexity", "bits_per_char", "exact_match", "bleu"} <= set(found)
        low, high = found["perplexity_ci"]
        assert 1 < low <= found["perplexity"] <= high < 300
    measured = {"tokens_per_second", "first_token_ms", "next_token_ms", "peak_mb"}
    for found in models.values():
        assert {"bytes", "parameters", "sparsity", "bits"} | measured <= set(found)
        assert all(found[name] > 0 for name in measured)
    assert [models[name]["bits"] for name in ("dense", "int8", "int4")] == [32, 8, 4]
    assert models["int8"]["bytes"] < models["sparse_75"]["bytes"] < models["dense"]["bytes"]


def test_bundles_are_complete_and_the_dense_one_is_a_hugging_face_model(
    folder: Path, result: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    assert set(result["bundles"]) == MODELS
    for path in result["bundles"].values():
        for member in ("bundle.json", "model.safetensors", "config.json", "MODEL_CARD.md"):
            assert (folder / path / member).is_file()
        assert (folder / path / "tokenizer" / "tokenizer.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder / result["bundles"]["dense"])
    dense = result["metrics"]["models"]["dense"]
    assert sum(weight.numel() for weight in model.parameters()) == dense["parameters"]


def test_the_pruned_weights_are_zeros_in_the_int8_bundle_too(
    folder: Path, result: dict[str, Any]
) -> None:
    import torch

    from goldcrest.tasks.language.bundle import load_bundle

    sparse, int8 = (
        load_bundle(folder / result["bundles"][name]).model for name in ("sparse_75", "int8")
    )
    codes = dict(int8.named_modules())
    pruned = 0
    for name, module in sparse.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            zeros = module.weight == 0
            assert zeros.float().mean() == pytest.approx(0.75, abs=0.01)
            assert (codes[name].weight[zeros] == 0).all()
            pruned += 1
    assert pruned == 14


def test_the_same_command_again_is_cached(folder: Path, result: dict[str, Any]) -> None:
    goldcrest(*COMMAND, "--json", "again.json", cwd=folder)
    again = json.loads((folder / "again.json").read_text())
    assert {step["state"] for step in again["steps"]} == {"cached"}
    assert again["metrics"] == result["metrics"]

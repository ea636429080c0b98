"""Models and bundles: any architecture there and back, and the ways in which a folder is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from goldcrest.cluster.api import InputError
from goldcrest.cluster.artifact import Output
from goldcrest.cluster.runtime import LocalRuntime
from goldcrest.kernels.language.architectures import own_state
from goldcrest.tasks.bundles import load_state
from goldcrest.tasks.language.bundle import (
    bundle_bytes,
    load_model,
    read_description,
    write_bundle,
)
from goldcrest.tasks.language.models import ModelConfig, build_model, load_pretrained, model_config
from tests.kernels.language import tiny_models

FAMILY = {"t5": "seq2seq", "bert": "masked", "whisper": "speech"}


def written(folder: Path, model: Any, *, packed: list[str] | None = None, **facts: Any) -> Path:
    """A bundle of the model with a stand-in for the tokenizer's files, which models don't read."""
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    folder.mkdir()
    write_bundle(
        Output(folder, runtime=LocalRuntime()),
        name="sparse_50" if packed else "dense",
        family=FAMILY.get(model.config.model_type, "causal"),
        config=model.config,
        tensors=own_state(model),
        tokenizer=tokenizer,
        facts=facts,
        packed=packed,
    )
    return folder


@pytest.mark.parametrize("architecture", sorted(tiny_models.MODELS))
def test_a_bundle_gives_back_the_model_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture]().eval()
    folder = written(tmp_path / "dense", model)
    loaded = load_model(folder)
    batch = tiny_models.batch(architecture)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert {n: v.shape for n, v in loaded.state_dict().items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    facts = read_description(folder)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["bits"] == 32
    assert bundle_bytes(folder) > 4 * facts["parameters"]


@pytest.mark.parametrize(
    ("architecture", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)]
)
def test_a_dense_bundle_is_a_model_folder_of_the_library(
    architecture: str, auto: Any, tmp_path: Path
) -> None:
    model = tiny_models.MODELS[architecture]().eval()
    folder = written(tmp_path / "dense", model)
    loaded, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    batch = tiny_models.batch(architecture)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_equal_models_make_equal_bundles(tmp_path: Path) -> None:
    """Whatever folder the model came from."""
    model = tiny_models.llama()
    first = written(tmp_path / "first", model)
    again = build_model(
        given := ModelConfig(path=str(first)), model_config(given, tokenizer=[None] * 64)
    )
    second = written(tmp_path / "second", again)
    for name in ("bundle.json", "config.json", "generation_config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_zeros_are_stored_as_bits(tmp_path: Path) -> None:
    model = tiny_models.gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.mul_(torch.arange(weight.numel()).reshape(weight.shape) % 4 == 0)
    dense, sparse = written(tmp_path / "d", model), written(tmp_path / "s", model, packed=[name])
    saved = bundle_bytes(dense) - bundle_bytes(sparse)
    assert saved == pytest.approx(weight.numel() * (4 * 0.75 - 1 / 8), abs=600)
    for key, value in load_state(dense).items():
        assert torch.equal(load_state(sparse)[key], value), key
    assert read_description(sparse)["sparsity"] > 0


def _break(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "bundle.json").write_text("{"), "can't be read"),
        (lambda f: _break(f, "bundle.json", kind="speaker"), "of kind 'language'"),
        (lambda f: _break(f, "bundle.json", schema=99), "schema 99"),
        (lambda f: _break(f, "bundle.json", family="seq2seq"), "no model of the family 'seq2seq'"),
        (lambda f: _break(f, "bundle.json", quantization={"form": "int2"}), "'int2' is none of"),
        (lambda f: _break(f, "config.json", model_type="evil"), "model type 'evil'"),
        (lambda f: _break(f, "config.json", hidden_size=48), "can't be used"),
        (lambda f: _break(f, "config.json", num_hidden_layers=2), "unknown weight"),
        (lambda f: _break(f, "config.json", num_hidden_layers=4), "are missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "can't be read"),
        (lambda f: (f / "config.json").unlink(), "can't be read"),
    ],
)
def test_a_damaged_bundle_is_refused_in_a_sentence(damage: Any, told: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "dense", tiny_models.llama())
    damage(folder)
    with pytest.raises(InputError, match=told):
        load_model(folder)


def test_code_that_a_config_names_never_runs(tmp_path: Path) -> None:
    folder = written(tmp_path / "dense", tiny_models.llama())
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _break(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    load_model(folder)
    given = ModelConfig(path=str(folder))
    build_model(given, model_config(given, tokenizer=[None] * 64))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architecture": "lama"}, "did you mean 'llama'"),
        ({"architecture": "t5"}, "it is seq2seq"),
        ({"settings": {"hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"settings": {"hidden_size": 33, "num_attention_heads": 4}}, "not a multiple"),
        ({"settings": {"vocab_size": 9}}, "comes from the tokenizer"),
        ({"path": "/a/model", "settings": {"hidden_size": 8}}, "settings are for fresh models"),
        ({"path": "/a/model", "revision": "main"}, "only names on the hub have revisions"),
        ({"path": "/a/model", "hub": "a/model"}, "not both"),
    ],
)
def test_a_bad_model_config_is_refused_in_a_sentence(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelConfig(**values)


def test_a_config_holds_every_setting() -> None:
    given = ModelConfig(settings={"hidden_size": 64, "num_attention_heads": 4})
    assert given.settings["rms_norm_eps"] == 1e-6 and given.settings["hidden_size"] == 64
    assert ModelConfig(**given.model_dump()) == given


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "no json"}])
def test_a_path_without_a_model_is_refused_in_a_sentence(
    content: dict[str, str], tmp_path: Path
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    given = ModelConfig(path=str(tmp_path))
    with pytest.raises(InputError, match=str(tmp_path)):
        model_config(given, tokenizer=[None] * 64)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    given = ModelConfig(path=str(written(tmp_path / "dense", tiny_models.llama())))
    with pytest.raises(InputError, match="65 tokens"):
        model_config(given, tokenizer=[None] * 65)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """The library would draw them at random and go on."""
    folder = tmp_path / "model"
    tiny_models.llama().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 3 weights .* model\.layers\.1\.mlp"):
        load_pretrained(ModelConfig(path=str(folder)))
    with pytest.raises(InputError, match="family 'masked'"):
        load_pretrained(ModelConfig(path=str(folder), family="masked"))


def test_a_bundle_is_loaded_as_bundles_are(tmp_path: Path) -> None:
    """A sparse one is packed, which the library would take for missing weights."""
    model = tiny_models.llama()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[:, ::2] = 0
    folder = written(tmp_path / "sparse", model, packed=[name])
    loaded = load_pretrained(ModelConfig(path=str(folder)))
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert all(value.requires_grad for value in loaded.parameters())
    with pytest.raises(InputError, match="family to causal"):
        load_pretrained(ModelConfig(path=str(folder), family="seq2seq"))
    codes = written(tmp_path / "int8", model, quantization={"form": "int8"})
    with pytest.raises(InputError, match="quantized"):
        load_pretrained(ModelConfig(path=str(codes)))


def test_weights_that_are_pickles_are_refused(tmp_path: Path) -> None:
    """A pickle runs code when it is read: only safetensors are."""
    folder = written(tmp_path / "dense", tiny_models.llama())
    torch.save(load_state(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    given = ModelConfig(path=str(folder))
    config = model_config(given, tokenizer=[None] * 64)
    with pytest.raises(InputError, match="safetensors"):
        build_model(given, config)


def test_a_hub_that_is_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = ModelConfig(hub="somebody/some-model", revision="0" * 40)
    with pytest.raises(InputError, match="somebody/some-model can't be loaded"):
        model_config(given, tokenizer=[None] * 64)

"""The task `quantize_int8`: float bundle and tokens in, a bundle that computes on integers out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldcrest.cluster.api import InputError, StepError
from goldcrest.cluster.artifact import Artifact, Output, describe_files
from goldcrest.cluster.runtime import LocalRuntime
from goldcrest.kernels.language.architectures import own_state
from goldcrest.kernels.language.stacks import block_linears
from goldcrest.kernels.quantization.int8_linear import Int8Linear
from goldcrest.tasks.bundles import load_state
from goldcrest.tasks.data.tokens import TokenRow, TokenWriter
from goldcrest.tasks.language.bundle import bundle_bytes, load_bundle, load_model, write_bundle
from goldcrest.tasks.language.quality import LossShard, load_on, row_losses
from goldcrest.tasks.language.quantize_int8 import QuantizeInt8Config, _batches, quantize_int8
from goldcrest.tasks.language.speed import SpeedConfig, measure_here
from tests.kernels.language import tiny_models

RunTask = Callable[..., Artifact]
FAMILY = {"t5": "seq2seq", "bert": "masked", "whisper": "speech"}
CFG = QuantizeInt8Config(calibration=8, calibration_length=16)


def finished(folder: Path, step: str) -> Artifact:
    manifest = {"key": "0" * 64, "step": step, "files": describe_files(folder), "metrics": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.at(folder)


def tokenizer_files(folder: Path) -> Path:
    words = {name: place for place, name in enumerate(("<pad>", "<bos>", "<eos>", "<mask>"))}
    words |= {f"w{place}": place for place in range(4, tiny_models.VOCABULARY)}
    rule = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    rule.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=rule, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>"
    )
    made.save_pretrained(folder)
    return folder


def bundle_of(folder: Path, model: Any, **facts: Any) -> Artifact:
    folder.mkdir()
    write_bundle(
        Output(folder, runtime=LocalRuntime()),
        name="dense",
        family=FAMILY.get(model.config.model_type, "causal"),
        config=model.config,
        tensors=own_state(model),
        tokenizer=tokenizer_files(folder.parent / "files"),
        facts=facts,
    )
    return finished(folder, "finetune")


def tokens_of(folder: Path, rows: int = 20) -> Artifact:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with TokenWriter(folder / "train.arrow") as writer:
        for number in range(rows):
            prompt, answer = (
                rng.integers(4, 60, rng.integers(3, 9)).astype(np.int32) for _ in range(2)
            )
            writer.write(TokenRow(prompt, answer), example=number, characters=9, size=9)
    return finished(folder, "tokens")


def test_a_bundle_stays_on_the_cpu_whose_operators_it_needs(
    tmp_path: Path, run_task: RunTask
) -> None:
    """Another device is asked for: "meta", which any machine has, in place of a GPU."""
    torch.manual_seed(0)
    dense = bundle_of(tmp_path / "dense", tiny_models.llama().eval())
    tokens = tokens_of(tmp_path / "tokens")
    made = run_task(quantize_int8, CFG, dense, tokens)
    assert load_on(dense.path, "meta").model.device.type == "meta"
    assert load_on(made.path, "meta").model.device.type == "cpu"
    rows = tokens.file("train.arrow")
    asked = [LossShard(made.path, rows, np.arange(4), 2, device) for device in ("meta", "cpu")]
    assert np.array_equal(*(row_losses(shard) for shard in asked))
    threads = torch.get_num_threads()  # measuring sets them for this process
    speed = SpeedConfig(prompt_tokens=3, new_tokens=2, repeats=1, threads=threads)
    assert measure_here(made.path, speed, "cuda")["peak_mb"] > 1  # of this process, not of a GPU


@pytest.mark.parametrize("architecture", ["llama", "t5", "bert"])
def test_the_bundle_computes_on_integers(
    architecture: str, tmp_path: Path, run_task: RunTask
) -> None:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture]().eval()
    dense, tokens = bundle_of(tmp_path / "dense", model), tokens_of(tmp_path / "tokens")
    made = run_task(quantize_int8, CFG, dense, tokens, seed=3)
    if architecture == "llama":
        again = run_task(quantize_int8, CFG, dense, tokens, seed=3)
        assert made.manifest["files"] == again.manifest["files"]
    loaded = load_bundle(made.path)
    assert loaded.facts["name"] == "int8"
    assert loaded.facts["quantization"]["form"] == "int8"
    assert any(isinstance(each, Int8Linear) for each in loaded.model.modules())
    batch = tiny_models.batch(architecture)
    with torch.no_grad():
        expected, found = model(**batch).logits, loaded.model(**batch).logits
    assert float((found - expected).norm() / expected.norm()) < 0.1
    loss = made.metrics["int8"]["calibration_loss"]
    assert loss["int8"] == pytest.approx(loss["float"], rel=0.02)
    assert made.file("figures/operations.png").stat().st_size > 0
    table = made.table("operations")
    assert table.num_rows == len(loaded.facts["quantization"]["scores"])


def test_a_masked_model_is_not_calibrated_on_guessing_special_tokens(tmp_path: Path) -> None:
    dense = bundle_of(tmp_path / "dense", tiny_models.bert(num_hidden_layers=1).eval())
    (tmp_path / "tokens").mkdir()
    ends = np.array([2, 2, 2, 2, 2, 9], np.int32)
    with TokenWriter(tmp_path / "tokens" / "train.arrow") as writer:
        for number in range(20):
            writer.write(TokenRow(ends[:1], ends[1:]), example=number, characters=9, size=9)
    given = _batches(
        CFG, "masked", load_model(dense.path), dense, finished(tmp_path / "tokens", "tokens"), 3
    )
    for batch in given:
        assert set(batch["labels"][batch["labels"] >= 0].tolist()) == {9}


def rows_of(folder: Path, rows: list[TokenRow]) -> Artifact:
    folder.mkdir()
    with TokenWriter(folder / "train.arrow") as writer:
        for number, row in enumerate(rows):
            writer.write(row, example=number, characters=9, size=9)
    return finished(folder, "tokens")


@pytest.mark.parametrize("criterion", ["kurtosis", "measured"])
def test_rows_whose_answer_is_cut_off_do_not_calibrate(
    criterion: str, tmp_path: Path, run_task: RunTask
) -> None:
    """A batch of them would have no loss but NaN, which would be every score."""
    dense = bundle_of(tmp_path / "dense", tiny_models.llama(num_hidden_layers=1).eval())
    tokens = np.arange(4, 34, dtype=np.int32)
    long, short = TokenRow(tokens[:20], tokens[20:]), TokenRow(tokens[:3], tokens[3:9])
    settings = {**CFG.settings, "criterion": criterion}
    cfg = CFG.model_copy(update={"rows_per_batch": 1, "calibration": 3, "settings": settings})
    made = run_task(quantize_int8, cfg, dense, rows_of(tmp_path / "few", [*[long] * 9, short] * 3))
    assert all(np.isfinite(each) for each in made.metrics["int8"]["calibration_loss"].values())
    assert np.isfinite(made.metrics["int8"]["worst"]["score"])
    assert json.loads(made.file("bundle.json").read_text())["training"]["calibration rows"] == 3
    with pytest.raises(StepError, match="cut to 16 tokens no row has an answer") as raised:
        run_task(quantize_int8, cfg, dense, rows_of(tmp_path / "none", [long] * 4))
    assert "raise calibration_length" in str(raised.value)


def test_skipped_operations_are_told_and_stay_float(tmp_path: Path, run_task: RunTask) -> None:
    torch.manual_seed(0)
    dense = bundle_of(tmp_path / "dense", tiny_models.gpt2().eval())
    cfg = CFG.model_copy(update={"settings": {**CFG.settings, "skip": 2, "weights": "rtn"}})
    made = run_task(quantize_int8, cfg, dense, tokens_of(tmp_path / "tokens"))
    skipped = made.metrics["int8"]["skipped"]
    assert len(skipped) == 2
    table = made.table("operations").to_pydict()
    assert sorted(np.array(table["operation"])[table["skipped"]]) == skipped
    assert table["kurtosis"] == sorted(table["kurtosis"], reverse=True)
    model = load_bundle(made.path).model
    assert not any(isinstance(model.get_submodule(name), Int8Linear) for name in skipped)


def test_a_sparse_model_keeps_its_zeros_and_is_packed(tmp_path: Path, run_task: RunTask) -> None:
    torch.manual_seed(0)
    model = tiny_models.llama(hidden_size=64, intermediate_size=128).eval()
    names = block_linears(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight[torch.rand_like(weight) < 0.75] = 0.0
    zeros = {name: model.get_submodule(name).weight == 0 for name in names}
    dense, tokens = bundle_of(tmp_path / "dense", model), tokens_of(tmp_path / "tokens")
    made = run_task(quantize_int8, CFG, dense, tokens)
    state = load_state(made.path)
    for name in names:
        assert bool((state[f"{name}.weight"][zeros[name]] == 0).all())
    description = json.loads(made.file("bundle.json").read_text())
    assert {f"{name}.weight" for name in names} <= set(description["packed"])
    stored = load_file(made.file("model.safetensors"))
    for name in names:
        dense_bytes = zeros[name].numel()
        packed_bytes = sum(
            stored[f"{name}.weight.{part}"].numel() for part in ("bitmask", "values")
        )
        left = 1 - float(zeros[name].float().mean())
        assert packed_bytes <= (left + 1 / 8) * dense_bytes + 1  # 1 byte a value, 1 bit a weight
    assert bundle_bytes(made.path) < 0.5 * bundle_bytes(dense.path)


def test_what_cannot_be_quantized_is_told(tmp_path: Path, run_task: RunTask) -> None:
    torch.manual_seed(0)
    model = tiny_models.gpt2().eval()
    tokens = tokens_of(tmp_path / "tokens")
    quantized = bundle_of(tmp_path / "dense", model, quantization={"form": "int8"})
    with pytest.raises(InputError, match="quantized already"):
        run_task(quantize_int8, CFG, quantized, tokens)
    (tmp_path / "more").mkdir()
    dense = bundle_of(tmp_path / "more" / "dense", model)
    with pytest.raises(StepError, match="no training rows"):
        run_task(quantize_int8, CFG, dense, tokens_of(tmp_path / "none", rows=0))
    short = bundle_of(tmp_path / "more" / "short", tiny_models.gpt2(n_positions=8).eval())
    with pytest.raises(InputError, match="positions for 8") as raised:
        run_task(quantize_int8, CFG, short, tokens)
    assert "lower calibration_length to 8" in str(raised.value)
    cut = CFG.model_copy(update={"calibration_length": 8})
    assert run_task(quantize_int8, cut, short, tokens).metrics["int8"]["linears"] > 0
    experts = bundle_of(tmp_path / "more" / "experts", tiny_models.mixtral().eval())
    with pytest.raises(StepError, match=r"can't be quantized to INT8: .* a model without experts"):
        run_task(quantize_int8, CFG, experts, tokens)
    cfg = CFG.model_copy(update={"settings": {**CFG.settings, "skip_names": ["transformer.h.9"]}})
    with pytest.raises(StepError, match="no operation is called so; did you mean"):
        run_task(quantize_int8, cfg, dense, tokens)
    with pytest.raises(ValueError, match="unknown setting 'alhpa'; did you mean 'alpha'"):
        QuantizeInt8Config(settings={"alhpa": 0.5})

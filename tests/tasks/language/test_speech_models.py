"""Tiny Whispers through the whole chain: trained, pruned, quantized, measured, used."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq

from goldcrest.cluster.api import Artifact, InputError
from goldcrest.kernels.language.block_outputs import recorded_outputs
from goldcrest.kernels.metrics.transcription import word_error_rate
from goldcrest.tasks.data.audio import from_pcm16
from goldcrest.tasks.data.speech_rows import SpeechReader
from goldcrest.tasks.language.batches import speech_batch
from goldcrest.tasks.language.bundle import bundle_bytes, load_bundle, read_description
from goldcrest.tasks.language.evaluate import EvaluateTextConfig, evaluate_text
from goldcrest.tasks.language.examples import read_examples
from goldcrest.tasks.language.finetune import FinetuneConfig, finetune
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.objective import feature_masks, model_inputs
from goldcrest.tasks.language.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.language.publish import PublishTextConfig, publish_text
from goldcrest.tasks.language.quality import load_on
from goldcrest.tasks.language.quantize_int4 import Int4Config, quantize_int4
from goldcrest.tasks.language.quantize_int8 import QuantizeInt8Config, quantize_int8
from goldcrest.tasks.language.recipe import read_text
from goldcrest.tasks.language.rows import check_speech
from goldcrest.tasks.language.sparse_finetune import SparseTextConfig, sparse_finetune_text
from goldcrest.tasks.language.speed import SpeedConfig, measure_here
from goldcrest.tasks.language.transcription import Transcriber
from tests.kernels.language import tiny_models
from tests.tasks.conftest import RunTask, runner
from tests.tasks.language import language_toys
from tests.tasks.language import speech_toys as toys
from tests.tasks.language.writing_models import BundleToyConfig, bundle_toy, tiny_bundle

LEARN: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "schedule": "cosine",
    "warmup_steps": 10,
    "clip_norm": 1.0,
}
BRIEF: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_steps": 0,
}
GREEDY = GenerationSettings(max_new_tokens=8)


@dataclass
class Chain:
    """Artifacts of a small run."""

    run: RunTask
    corpus: Artifact
    tokenizer: Artifact
    tokens: Artifact
    dense: Artifact


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("speech")
    run = runner(folder)
    corpus, words, rows = toys.chain(run, toys.corpus_folder(folder / "words", 200))
    cfg = PretrainConfig(model=toys.MODEL, training=LEARN, evaluation_rows=32)
    return Chain(run, corpus, words, rows, run(pretrain, cfg, words, rows, seed=1))


@pytest.fixture(scope="module")
def sparse(chain: Chain) -> Artifact:
    cfg = SparseTextConfig(
        sparsity=0.5, settings={"block": 16}, calibration_rows=32, training=BRIEF
    )
    return chain.run(sparse_finetune_text, cfg, chain.dense, chain.tokens, None, None)


@pytest.fixture(scope="module")
def int8(chain: Chain) -> Artifact:
    cfg = QuantizeInt8Config(calibration=32, calibration_length=8)
    return chain.run(quantize_int8, cfg, chain.dense, chain.tokens)


METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {},
    "awq": {"steps": 4},
    "teq": {"steps": 10},
    "autoround": {"iterations": 10},
}


def to_int4(chain: Chain, method: str) -> Artifact:
    """The dense model by one method."""
    cfg = Int4Config(
        methods={method: METHODS[method]},
        group_sizes=(32,),
        calibration=12,
        calibration_length=8,
        evaluation=32,
        batch_tokens=300,
        tolerance=9.0,
        max_spared=0,
    )
    return chain.run(quantize_int4, cfg, chain.dense, chain.tokens, None)


@pytest.fixture(scope="module")
def int4(chain: Chain) -> Artifact:
    return to_int4(chain, "gptq")


def test_a_fresh_whisper_learns_to_write_what_it_hears(chain: Chain) -> None:
    history = chain.dense.json("history")
    assert history[-1]["cross_entropy"] < 0.3 * history[0]["cross_entropy"]
    assert history[-1]["validation_perplexity"] < 2
    facts = read_description(chain.dense.path)
    assert (facts["family"], facts["architecture"]) == ("speech", "whisper")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(chain.dense.path)
    ours = load_bundle(chain.dense.path)
    heard, ids = torch.randn(2, 80, 60), torch.tensor([[1, 5, 9]] * 2)
    with torch.no_grad():
        found, expected = (
            m(input_features=heard, decoder_input_ids=ids) for m in (ours.model, model)
        )
    assert torch.equal(found.logits, expected.logits)
    sines = type(model.model.encoder)(model.config).embed_positions.weight
    assert torch.equal(ours.model.get_parameter("model.encoder.embed_positions.weight"), sines)


@pytest.mark.parametrize("what", ["fresh", pytest.param("sparse", marks=pytest.mark.slow)])
def test_training_goes_on_where_it_was_stopped(what: str, chain: Chain, tmp_path: Path) -> None:
    """With dropout: the bytes of an undisturbed run."""
    inputs: tuple[Any, ...] = (chain.tokenizer, chain.tokens)
    model = {**toys.MODEL, "settings": {**toys.WHISPER, "dropout": 0.1}}
    task, cfg = pretrain, PretrainConfig(model=model, training=BRIEF)
    if what == "sparse":
        inputs = (chain.dense, chain.tokens, None, None)
        task, cfg = sparse_finetune_text, SparseTextConfig(sparsity=0.5, training=BRIEF)
    run, scratch = runner(tmp_path), tmp_path / "scratch"
    first = run(task, cfg, *inputs)
    shutil.copytree(scratch / f"001-{task.name}", scratch / f"002-{task.name}")
    last = sorted((scratch / f"002-{task.name}").rglob("epoch-*"))[-1]
    assert last.name == "epoch-00002"
    shutil.rmtree(last)
    again = run(task, cfg, *inputs)
    for file in ("model.safetensors", "history.json"):
        assert again.file(file).read_bytes() == first.file(file).read_bytes()


def test_fine_tuning_goes_on_from_a_bundle_that_was_taken_as_it_is(chain: Chain) -> None:
    given = {"family": "speech", "path": str(chain.dense.path)}
    taken = chain.run(pretrain, PretrainConfig(model=given, training=None), chain.tokenizer, None)
    weights = [each.file("model.safetensors").read_bytes() for each in (taken, chain.dense)]
    assert weights[0] == weights[1]
    cfg = FinetuneConfig(training=BRIEF, activation_checkpointing=True)
    tuned = chain.run(finetune, cfg, taken, chain.tokens)
    before = chain.dense.json("history")[-1]["cross_entropy"]
    assert tuned.json("history")[-1]["cross_entropy"] < 1.2 * before


def test_what_the_model_is_fed_is_what_the_library_feeds(chain: Chain) -> None:
    """Our shift of the labels against the library's; every frame counts, padded labels do not."""
    bundle = load_bundle(chain.dense.path)
    text = read_text(chain.tokens, chain.dense.path / "tokenizer", "speech", bundle.model.config)
    batch = text.collate([text.train[row] for row in range(6)], np.random.default_rng(0))
    assert batch["input_features"].shape == (6, 80, 60)
    inputs = model_inputs(bundle.model, batch)
    assert set(inputs) == {"input_features", "decoder_input_ids", "use_cache"}
    with torch.no_grad(), recorded_outputs(bundle.model) as outputs:
        ours = bundle.model(**inputs).logits
        shifted = {name: batch[name] for name in ("input_features", "labels")}
        theirs = bundle.model(**shifted).logits  # which shifts the labels itself
    assert torch.equal(ours, theirs)
    masks = feature_masks(bundle.model, batch)
    assert masks[:2] == [None, None] and len(masks) == 4 == len(outputs) // 2
    assert torch.equal(masks[3], batch["labels"] != -100) and not bool(masks[3].all())
    assert [tuple(each.shape[:2]) for each in outputs[:4]] == [(6, 30)] * 2 + [(6, 4)] * 2


def test_a_pruned_whisper_is_taught_by_the_dense_one(chain: Chain, sparse: Artifact) -> None:
    """SquareHead over encoder and decoder; zeros in both, cross-attention included."""
    history = sparse.json("history")
    assert history[-1]["squarehead"] < history[0]["squarehead"]
    assert history[0]["loss"] == pytest.approx(
        history[0]["cross_entropy"] + history[0]["squarehead"], rel=1e-5
    )
    packed = read_description(sparse.path)["packed"]
    state = load_bundle(sparse.path).model.state_dict()
    for name in (
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.1.encoder_attn.k_proj.weight",
        "model.decoder.layers.1.fc2.weight",
    ):
        assert name in packed
        assert float((state[name] == 0).float().mean()) >= 0.5
    assert not any("conv" in name or "embed" in name or "proj_out" in name for name in packed)
    assert sparse.metrics["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=1e-3)
    assert bundle_bytes(sparse.path) < bundle_bytes(chain.dense.path)


def test_calibration_is_on_what_was_said(chain: Chain) -> None:
    """SparseGPT, which sees the inputs of every layer, is nearer to the dense model than magnitude
    pruning at the same sparsity, which sees none."""
    losses = {}
    for method in ("sparsegpt", "magnitude"):
        cfg = SparseTextConfig(sparsity=0.75, method=method, distillation="none", training=None)
        made = chain.run(sparse_finetune_text, cfg, chain.dense, chain.tokens, None, None)
        model = load_bundle(made.path).model
        reader = SpeechReader(chain.tokens.file("validation.arrow"))
        batch = speech_batch([reader[row] for row in range(len(reader))], 60, 0, 1)
        with torch.no_grad():
            losses[method] = float(model(**batch).loss)
    assert losses["sparsegpt"] < losses["magnitude"]


def test_int8_computes_on_integers(chain: Chain, int8: Artifact) -> None:
    loss = int8.metrics["int8"]["calibration_loss"]
    assert loss["int8"] == pytest.approx(loss["float"], abs=0.05)
    scored = int8.table("operations").to_pydict()["operation"]
    assert any("encoder_attn" in name for name in scored)
    assert any(name.startswith("model.encoder") for name in scored)
    assert bundle_bytes(int8.path) < 0.6 * bundle_bytes(chain.dense.path)


@pytest.mark.parametrize(
    "method",
    [
        "awq",
        "gptq",
        pytest.param("autoround", marks=pytest.mark.slow),
        pytest.param("rtn", marks=pytest.mark.slow),
        pytest.param("teq", marks=pytest.mark.slow),
    ],
)
def test_every_method_of_int4_calibrates_on_speech(method: str, chain: Chain) -> None:
    """Layers of both stacks, and those of the decoder that read the encoder's states."""
    made = to_int4(chain, method)
    facts = read_description(made.path)
    assert facts["quantization"]["method"] == method and facts["bits"] == 4
    assert not facts["quantization"]["uncalibrated"]
    layers = facts["quantization"]["layers"]
    assert {
        "model.encoder.layers.1.fc1",
        "model.decoder.layers.0.self_attn.out_proj",
        "model.decoder.layers.1.encoder_attn.v_proj",
    } <= set(layers)
    told = made.metrics["int4"]
    assert told["loss"] < told["float"]["loss"] + 0.1
    assert load_bundle(made.path).model.config.max_source_positions == 30


def test_transcripts_are_those_of_the_models_own_logits(chain: Chain) -> None:
    """Greedy by `generate` against one forward pass per token; a neighbour changes nothing."""
    transcriber = Transcriber(load_bundle(chain.dense.path), batch_size=3)
    reader = SpeechReader(chain.tokens.file("test.arrow"))
    heard = [reader[row].features for row in range(4)]
    made = transcriber.transcribe(heard, GREEDY)
    for features, found in zip(heard, made, strict=True):
        inputs = transcriber._inputs([features])
        ids = inputs["decoder_input_ids"]
        for _ in range(8):
            with torch.no_grad():
                logits = transcriber.model(
                    input_features=inputs["input_features"], decoder_input_ids=ids
                ).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == transcriber.tokenizer.eos_token_id:
                break
        expected = [each for each in ids[0, 1:].tolist() if each != 2]
        assert list(found.tokens) == expected
        assert found.finish_reason == "stop" and found.prompt_tokens == 1
        assert transcriber.transcribe([features], GREEDY)[0] == found
    beams = GenerationSettings(max_new_tokens=8, beams=3)
    assert len(transcriber.transcribe(heard, beams)) == 4


def test_a_bundle_writes_down_samples(chain: Chain) -> None:
    transcriber = Transcriber(load_bundle(chain.dense.path))
    table = chain.corpus.table("test").to_pylist()
    heard = transcriber.hear([from_pcm16(row["audio"]) for row in table])
    texts = [each.text for each in transcriber.transcribe(heard, GREEDY)]
    truth = [[" ".join(row["answer"])] for row in table]
    assert word_error_rate([" ".join(text) for text in texts], truth).value < 30
    room = GenerationSettings(max_new_tokens=1000)
    assert transcriber.transcribe(heard[:1], room)[0].text == texts[0]
    with pytest.raises(InputError, match=r"an utterance of 1 s; the model reads up to 0\.6 s"):
        transcriber.hear([np.zeros(16_000, np.float32)])
    with pytest.raises(InputError, match="an utterance of 0 s"):
        transcriber.hear([np.zeros(0, np.float32)])


def test_quality_and_speed_of_every_model(
    chain: Chain, sparse: Artifact, int8: Artifact, int4: Artifact
) -> None:
    cfg = EvaluateTextConfig(
        metrics=("wer", "cer", "exact_match"),
        generation=GREEDY,
        bootstrap=20,
        batch_rows=4,
        shard_rows=9,
        shown=3,
        speed=None,
    )
    models = {"dense": chain.dense, "sparse_50": sparse, "int8": int8, "int4": int4}
    made = chain.run(evaluate_text, cfg, chain.corpus, chain.tokens, **models)
    rows = SpeechReader(chain.tokens.file("test.arrow"))
    for values in made.metrics["language"].values():
        assert {"perplexity", "bits_per_char", "entropy", "wer", "cer"} <= set(values)
        assert values["rows"] == values["examples"] == len(rows) > 5
    dense = made.metrics["language"]["dense"]
    batch = speech_batch([rows[row] for row in range(len(rows))], 60, 0, 1)
    with torch.no_grad():
        loss = float(load_on(chain.dense.path, "cpu").model(**batch).loss)
    assert dense["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    total = loss * int(rows.predicted.sum()) / np.log(2)
    assert dense["bits_per_char"] == pytest.approx(total / int(rows.characters.sum()), rel=1e-4)
    assert dense["cer"] < 30
    for name in ("int8", "int4"):
        assert made.metrics["language"][name]["cer"] < dense["cer"] + 30
    shown = made.table("answers").to_pylist()
    known = {row.id: row.answer for row in read_examples(chain.corpus, "test")}
    assert len(shown) == 3 * len(models)
    assert all(row["references"] == [known[row["id"]]] for row in shown)
    assert made.file("figures/quality_by_sparsity.png").stat().st_size > 0
    bundle = chain.run(publish_text, PublishTextConfig(), chain.dense, made)
    assert read_description(bundle.path)["measured"]["wer"] == dense["wer"]


def test_speed_of_a_speech_model(chain: Chain) -> None:
    cfg = SpeedConfig(new_tokens=40, repeats=1)
    times = measure_here(chain.dense.path, cfg, "cpu")
    assert cfg.new_tokens == 40  # more than the decoder has positions for
    assert 0 < times["next_token_ms"] < times["first_token_ms"] * 5
    assert times["tokens_per_second"] > 0 and times["peak_mb"] > 0
    assert times["prompt_tokens"] == 1 and times["new_tokens"] == 11


# -- what can't be done, in a sentence ------------------------------------------------------------


def test_what_does_not_fit_together_is_refused(chain: Chain, tmp_path: Path) -> None:
    folder = chain.dense.path / "tokenizer"
    config = copy.deepcopy(load_bundle(chain.dense.path).model.config)
    text = language_toys.tokens_artifact(tmp_path / "text")
    with pytest.raises(InputError, match="made for the family 'causal', the model is 'speech'"):
        read_text(text, folder, "speech", config)
    with pytest.raises(InputError, match="made for the family 'speech', the model is 'causal'"):
        read_text(chain.tokens, folder, "causal", tiny_models.llama().config)
    config.num_mel_bins = 128
    with pytest.raises(InputError, match="the rows have 80 mel bins, the model reads 128"):
        read_text(chain.tokens, folder, "speech", config)
    config.num_mel_bins, config.max_source_positions = 80, 15
    with pytest.raises(InputError, match=r"longer than the 0\.3 s that the model reads"):
        read_text(chain.tokens, folder, "speech", config)
    config.max_source_positions, config.max_target_positions = 30, 3
    with pytest.raises(InputError, match="positions for 3"):
        read_text(chain.tokens, folder, "speech", config)
    other = tiny_models.t5().config
    with pytest.raises(InputError, match="does not read Whisper's log-mel features"):
        check_speech(SpeechReader(chain.tokens.file("train.arrow")), other)
    with pytest.raises(InputError, match="the rows of tokens have no features"):
        chain.run(quantize_int8, QuantizeInt8Config(), chain.dense, text)
    with pytest.raises(InputError, match="the rows of tokens have no features"):
        chain.run(quantize_int4, Int4Config(), chain.dense, text, None)


def test_text_and_speech_have_generators_of_their_own(chain: Chain) -> None:
    with pytest.raises(InputError, match="'speech' does not write text after a prompt"):
        Generator(load_bundle(chain.dense.path))
    with pytest.raises(InputError, match="Transcriber takes models of speech"):
        Transcriber(tiny_bundle("llama"))


def test_models_of_two_kinds_are_not_evaluated_together(chain: Chain) -> None:
    llama = chain.run(bundle_toy, BundleToyConfig(tokenizer=str(chain.dense.path / "tokenizer")))
    with pytest.raises(Exception, match="can't be evaluated on the same rows"):
        chain.run(
            evaluate_text,
            EvaluateTextConfig(),
            chain.corpus,
            chain.tokens,
            dense=chain.dense,
            other=llama,
        )

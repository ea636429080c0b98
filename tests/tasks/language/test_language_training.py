"""Pretraining, fine-tuning and sparse fine-tuning on the real engine, with models of seconds."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from goldcrest.cluster.api import Artifact, InputError, StepError
from goldcrest.cluster.artifact import Output
from goldcrest.cluster.runtime import LocalRuntime
from goldcrest.tasks.bundles import load_state
from goldcrest.tasks.data.tokens import TokenReader, TokenRow, TokenWriter
from goldcrest.tasks.language.bundle import (
    bundle_bytes,
    load_bundle,
    read_description,
)
from goldcrest.tasks.language.finetune import FinetuneConfig, finetune
from goldcrest.tasks.language.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.language.sparse_finetune import (
    LevelsConfig,
    SparseTextConfig,
    sparse_finetune_text,
)
from tests.tasks.language import language_toys as toys

FAST: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 12,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.01,
}
FAMILIES = sorted(toys.MODELS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tokenizer of 64 words."""
    return toys.tokenizer_artifact(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Rows by family; "packed" are causal."""
    folder = tmp_path_factory.mktemp("tokens")
    made = {
        each: toys.tokens_artifact(folder / each, family=each, packed=each == "masked")
        for each in FAMILIES
    }
    return {**made, "packed": toys.tokens_artifact(folder / "packed", packed=True)}


def pretrain_config(family: str, **changes: Any) -> PretrainConfig:
    training = {**FAST, "epochs": 3, **changes}
    return PretrainConfig(model=toys.MODELS[family], training=training, evaluation_rows=16)


@pytest.fixture(scope="module")
def dense(
    tokenizer: Artifact, tokens: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """A trained bundle of each family, made when it is first asked for."""
    from tests.tasks.conftest import runner

    run = runner(tmp_path_factory.mktemp("dense"))

    class Made(dict[str, Artifact]):
        def __missing__(self, family: str) -> Artifact:
            rows = tokens[family]
            self[family] = run(pretrain, pretrain_config(family), tokenizer, rows, seed=3)
            return self[family]

    return Made()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_model_learns_and_its_bundle_is_complete(
    family: str, dense: dict[str, Artifact], tmp_path: Path
) -> None:
    history = dense[family].json("history")
    share = 1.0 if family == "masked" else 0.8  # few of its tokens are hidden: it learns slowly
    assert history[-1]["cross_entropy"] < share * history[0]["cross_entropy"]
    last = history[-1]
    assert last["validation_perplexity"] == pytest.approx(np.exp(last["validation_loss"]))
    assert 0 < last["validation_entropy"] <= np.log(toys.WORDS)
    loaded = load_bundle(dense[family].path)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == toys.WORDS
    assert loaded.model.config.eos_token_id == 2 and loaded.model.config.pad_token_id == 0
    assert loaded.facts["name"] == "dense" and loaded.facts["family"] == family
    for name in ("MODEL_CARD.md", "figures/history.png", "generation_config.json"):
        assert dense[family].file(name).stat().st_size > 0


def test_a_trained_bundle_loads_with_the_library_and_counts_up(dense: dict[str, Artifact]) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense["causal"].path)
    ours = load_bundle(dense["causal"].path)
    prompt = torch.tensor([[20, 21], [30, 31]])
    assert torch.equal(model(prompt).logits, ours.model(prompt).logits)


def test_training_goes_on_where_it_was_stopped(
    tokenizer: Artifact, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    """With dropout, steps by tokens and checkpointed activations: the bytes of an undisturbed
    run, also where the continuation keeps its activations."""
    from tests.tasks.conftest import runner

    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    training = {**FAST, "batch_units": 120, "micro_batch_units": 60}

    def config(*, checkpointing: bool) -> PretrainConfig:
        return PretrainConfig(
            model={"architecture": "gpt2", "settings": gpt2},
            training=training,
            activation_checkpointing=checkpointing,
        )

    whole = runner(tmp_path / "whole")(
        pretrain, config(checkpointing=True), tokenizer, tokens["causal"]
    )
    kept = runner(tmp_path / "kept")
    first = kept(pretrain, config(checkpointing=False), tokenizer, tokens["causal"])
    scratch = tmp_path / "kept" / "scratch"
    shutil.copytree(scratch / "001-pretrain", scratch / "002-pretrain")
    last = sorted((scratch / "002-pretrain").rglob("epoch-*"))[-1]
    assert last.name == "epoch-00002"
    shutil.rmtree(last)
    again = kept(pretrain, config(checkpointing=True), tokenizer, tokens["causal"])
    files = [
        {n: f["sha256"] for n, f in made.manifest["files"].items()}
        for made in (whole, first, again)
    ]
    assert files[0] == files[1] == files[2]


def test_sparse_fine_tuning_goes_on_where_it_was_stopped(
    dense: dict[str, Artifact],
    tokens: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 under ZeRO 3; what was pruned already is not pruned again."""
    from goldcrest.tasks.language import sparse_finetune
    from tests.tasks.conftest import runner

    run, scratch = runner(tmp_path), tmp_path / "scratch"
    training = {**FAST, "zero_stage": 3, "precision": "bf16"}
    arguments = (sparse_config(training=training), dense["causal"], tokens["causal"], None, None)
    first = run(sparse_finetune_text, *arguments)
    name = sparse_finetune_text.name
    shutil.copytree(scratch / f"001-{name}", scratch / f"002-{name}")
    shutil.rmtree(sorted((scratch / f"002-{name}").rglob("epoch-*"))[-1])
    monkeypatch.setattr(sparse_finetune, "prune_bundle", None)
    again = run(sparse_finetune_text, *arguments)
    for file in ("model.safetensors", "history.json"):
        assert again.file(file).read_bytes() == first.file(file).read_bytes()
    assert all(float(zeros.float().mean()) >= 0.75 for zeros in zeros_of(first).values())


@pytest.mark.parametrize(
    ("profile", "training", "gpus"),
    [
        (0.0, None, 0.0),
        (0.0, FAST, 0.0),
        (1.0, None, 1.0),
        (1.0, FAST, 1.0),
        (0.0, {**FAST, "gpus_per_worker": 1.0}, 1.0),
    ],
)
def test_pruning_asks_for_the_gpu_that_the_profile_or_the_training_has(
    profile: float,
    training: dict[str, Any] | None,
    gpus: float,
    dense: dict[str, Artifact],
    tokens: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For its worker: the step holds nothing, so the one GPU of a machine is free for that."""
    from goldcrest.tasks.language import sparse_finetune

    told: dict[str, Any] = {}

    class Enough(Exception):  # noqa: N818 - ends the step
        """What is asked for is known."""

    def prune_bundle(folder: Path, **given: Any) -> None:
        told["device"] = given["device"]
        raise Enough

    class Runtime(LocalRuntime):
        def map(self, function: Any, items: Any, *, gpus: float = 0.0, **given: Any) -> Any:
            told["gpus"] = gpus
            return super().map(function, items, **given)

    monkeypatch.setattr(sparse_finetune, "prune_bundle", prune_bundle)
    runtime = Runtime()
    runtime.gpus = profile
    out = Output(tmp_path / "out", runtime=runtime, scratch=tmp_path / "scratch")
    cfg = sparse_config(training=training)
    with pytest.raises(Enough):
        sparse_finetune_text(cfg, dense["causal"], tokens["causal"], None, None, out=out)
    assert told == {"gpus": gpus, "device": "cuda" if gpus else "cpu"}
    assert sparse_finetune_text.resources.cpus == 0


def test_where_a_bundle_is_pruned_is_told_to_the_kernel(
    dense: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    """On "meta", which has no numbers, pruning ends as soon as it asks for one."""
    from goldcrest.tasks.language.recipe import read_text
    from goldcrest.tasks.language.sparse_finetune import load_config, prune_bundle

    folder = dense["causal"].path
    text = read_text(
        tokens["causal"],
        tokenizer=folder / "tokenizer",
        family="causal",
        config=load_config(folder),
    )
    prune = functools.partial(
        prune_bundle, folder, text=text, cfg=sparse_config(), seed=0, into=tmp_path
    )
    prune()
    assert (tmp_path / "weights.safetensors").is_file()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        prune(device="meta")


def test_packed_documents_train_in_bf16(
    tokenizer: Artifact, tokens: dict[str, Artifact], run_task: Any
) -> None:
    made = run_task(
        pretrain, pretrain_config("causal", precision="bf16"), tokenizer, tokens["packed"]
    )
    history = made.json("history")
    assert history[-1]["cross_entropy"] < 0.8 * history[0]["cross_entropy"]
    assert made.manifest["measurements"]["training"]["pretrain"]["tokens_per_second"] > 0


def test_a_trained_model_is_taken_as_it_is_or_trained_further(
    dense: dict[str, Artifact], tokenizer: Artifact, tokens: dict[str, Artifact], run_task: Any
) -> None:
    path = str(dense["seq2seq"].path)
    given = {"family": "seq2seq", "path": path}
    taken = run_task(pretrain, PretrainConfig(model=given, training=None), tokenizer, None)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert taken.file(name).read_bytes() == dense["seq2seq"].file(name).read_bytes(), name
    further = run_task(
        pretrain, PretrainConfig(model=given, training=FAST), tokenizer, tokens["seq2seq"]
    )
    before = dense["seq2seq"].json("history")[-1]["validation_loss"]
    assert further.json("history")[-1]["validation_loss"] < before
    assert path not in further.file("bundle.json").read_text()


def test_fine_tuning_goes_on_from_the_bundle(
    dense: dict[str, Artifact], tokens: dict[str, Artifact], run_task: Any
) -> None:
    cfg = FinetuneConfig(training=FAST)
    tuned = run_task(finetune, cfg, dense["causal"], tokens["causal"])
    before = dense["causal"].json("history")[-1]["validation_loss"]
    assert tuned.json("history")[-1]["validation_loss"] < before
    facts = read_description(tuned.path)
    assert facts["base_sha256"] == dense["causal"].manifest["files"]["model.safetensors"]["sha256"]
    assert facts["training"]["fine-tuning epochs"] == FAST["epochs"]


# -- sparse fine-tuning ---------------------------------------------------------------------------


def sparse_config(**changes: Any) -> SparseTextConfig:
    values: dict[str, Any] = {"settings": {"block": 16}, "calibration_rows": 32, "training": FAST}
    values["evaluation_rows"] = 16
    if changes.get("method", "sparsegpt") != "sparsegpt":
        values.pop("settings")
    return SparseTextConfig(**{**values, **changes})


def zeros_of(bundle: Artifact) -> dict[str, torch.Tensor]:
    state = load_state(bundle.path)
    return {name: state[name] == 0 for name in read_description(bundle.path)["packed"]}


@pytest.mark.parametrize(
    ("family", "distillation"),
    [
        ("causal", "none"),
        ("causal", "squarehead"),
        ("seq2seq", "squarehead"),
        ("masked", "logits"),
        pytest.param("causal", "logits", marks=pytest.mark.slow),
        pytest.param("causal", "feature_mse", marks=pytest.mark.slow),
        pytest.param("seq2seq", "logits", marks=pytest.mark.slow),
    ],
)
def test_a_pruned_model_is_fine_tuned_with_its_masks_held(
    family: str,
    distillation: str,
    dense: dict[str, Artifact],
    tokens: dict[str, Artifact],
    run_task: Any,
) -> None:
    """Through AdamW with momentum and weight decay; the head and embeddings stay full."""
    cfg = sparse_config(distillation=distillation)
    made = run_task(sparse_finetune_text, cfg, dense[family], tokens[family], None, None)
    history = made.json("history")
    assert history[-1]["loss"] < history[0]["loss"]
    names = {"cross_entropy", distillation} - {"none"}
    assert history[0]["loss"] == pytest.approx(sum(history[0][name] for name in names), rel=1e-5)
    facts = read_description(made.path)
    assert facts["name"] == "sparse_75" and facts["packed"]
    for name, zeros in zeros_of(made).items():
        assert int(zeros.sum()) >= round(0.75 * zeros.numel()), name
    others = set(load_state(made.path)) - set(facts["packed"])
    assert any("embed" in name or "shared" in name for name in others)
    assert not any("lm_head" in name for name in facts["packed"])
    assert made.metrics["sparsity"]["pruned_layers"] == pytest.approx(0.75, abs=1e-3)
    assert bundle_bytes(made.path) < bundle_bytes(dense[family].path)
    assert load_bundle(made.path).model.config.vocab_size == toys.WORDS


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "magnitude"}, None),
        ({"method": "magnitude", "settings": {"scope": "global"}}, None),
        ({"method": "wanda", "sparsity": 0.5, "settings": {"pattern": (2, 4)}}, None),
        ({"sparsity": 0.5, "settings": {"block": 16, "pattern": (2, 4)}}, None),
        ({"skip": ("model.layers.0", "model.layers.1.mlp")}, "model.layers.1.self_attn"),
    ],
)
def test_one_shot_pruning_by_every_method(
    changes: dict[str, Any],
    names: str | None,
    dense: dict[str, Artifact],
    tokens: dict[str, Artifact],
    run_task: Any,
) -> None:
    cfg = sparse_config(**{**changes, "training": None})
    made = run_task(sparse_finetune_text, cfg, dense["causal"], tokens["causal"], None, None)
    found = zeros_of(made)
    total = sum(zeros.numel() for zeros in found.values())
    pruned = sum(int(zeros.sum()) for zeros in found.values())
    assert pruned == pytest.approx(cfg.sparsity * total, abs=len(found))
    if "pattern" in changes.get("settings", {}):
        assert all(
            bool((zeros.reshape(zeros.shape[0], -1, 4).sum(2) == 2).all())
            for zeros in found.values()
        )
    if changes.get("settings", {}).get("scope") == "global":
        assert len({round(float(zeros.float().mean()), 3) for zeros in found.values()}) > 1
    if names is not None:
        assert all(name.startswith(names) for name in found)
    assert "history.json" not in made


def test_pruning_calibrates_on_a_corpus_of_its_own(
    dense: dict[str, Artifact], tokens: dict[str, Artifact], run_task: Any, tmp_path: Path
) -> None:
    """The masks are those of that corpus; what is trained on stays the task's."""
    other = toys.tokens_artifact(tmp_path / "other", rows=20)

    def made(rows: Artifact, calibration: Artifact | None, **changes: Any) -> bytes:
        arguments = (sparse_config(**changes), dense["causal"], rows, None, calibration)
        return run_task(sparse_finetune_text, *arguments).file("model.safetensors").read_bytes()

    task = tokens["causal"]
    assert made(task, other, training=None) == made(other, None, training=None)
    assert made(task, other, training=None) != made(task, None, training=None)
    # Magnitudes need no calibration: only the training is left to tell.
    assert made(task, other, method="magnitude") == made(task, None, method="magnitude")
    with pytest.raises(InputError, match="made for the family 'seq2seq'"):
        made(task, tokens["seq2seq"])


def test_a_gradual_schedule_prunes_what_was_fine_tuned(
    dense: dict[str, Artifact], tokens: dict[str, Artifact], run_task: Any
) -> None:
    """With keep_zeros the masks nest; the teacher stays the dense model."""
    levels = LevelsConfig(
        levels=(0.5, 0.75),
        gradual=True,
        recipe=sparse_config(settings={"block": 16, "keep_zeros": True}),
        changes={"75": {"training": {"epochs": 1}}},
    )
    previous = None
    for level in levels.levels:
        cfg = levels.step(level)
        bundle = run_task(
            sparse_finetune_text, cfg, dense["causal"], tokens["causal"], previous, None
        )
        if previous is not None:
            before, after = zeros_of(previous), zeros_of(bundle)
            assert all(bool(after[name][zeros].all()) for name, zeros in before.items())
            assert len(bundle.json("history")) == 1
        previous = bundle
    assert previous is not None
    assert (
        read_description(previous.path)["base_sha256"]
        == (dense["causal"].manifest["files"]["model.safetensors"]["sha256"])
    )


# -- what can't be done, in a sentence ------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sparsity": 0}, "prunes nothing"),
        ({"sparsity": 1}, "leaves no weight"),
        ({"sparsity": 1.5}, "leaves no weight"),
        ({"method": "sparsgpt"}, "did you mean 'sparsegpt'"),
        ({"settings": {"pattern": (2, 4)}}, "sparsity of 0.5, not 0.75"),
        ({"distillation": "none", "distillation_settings": {"weight": 2}}, "distillation is none"),
        ({"distillation": "none", "task_weight": 0}, "no loss to train with"),
        ({"distillation_settings": {"weight": 0}, "task_weight": 0}, "no loss to train with"),
    ],
)
def test_a_bad_sparse_config_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SparseTextConfig(**values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"levels": (0.75, 0.5)}, "must rise"),
        ({"levels": (0.5, 1.0)}, "leaves no weight"),
        ({"levels": (0.5, 0.501)}, "same percent"),
        ({"levels": (0.5,), "changes": {"60": {}}}, "changes name '60'; levels are 50"),
        ({"levels": (0.5,), "changes": {"50": {"training": {"epoch": 1}}}}, "epoch"),
    ],
)
def test_bad_levels_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LevelsConfig(**values)


def test_a_pattern_needs_no_sparsity_beside_its_level() -> None:
    levels = LevelsConfig(levels=(0.5,), recipe={"settings": {"pattern": [2, 4]}})  # type: ignore[arg-type]
    assert levels.step(0.5).settings["pattern"] == [2, 4]
    with pytest.raises(ValueError, match=r"2 zeros in 4 is a sparsity of 0.5, not 0.75"):
        LevelsConfig(levels=(0.5, 0.75), recipe={"settings": {"pattern": [2, 4]}})  # type: ignore[arg-type]


def test_a_level_may_change_its_method() -> None:
    """Settings of the recipe's method are not handed to another one; single values are merged."""
    changes = {"50": {"method": "wanda", "distillation": "none"}, "75": {"training": {"epochs": 7}}}
    levels = LevelsConfig(recipe=sparse_config(), changes=changes)
    one, two = (levels.step(level) for level in levels.levels)
    assert one.method == "wanda" and one.settings == {"pattern": None}
    assert two.training is not None and two.training.epochs == 7
    assert two.training.learning_rate == FAST["learning_rate"]
    assert two.settings["block"] == 16


def test_a_fresh_model_must_be_trained() -> None:
    with pytest.raises(ValueError, match="the model is fresh"):
        PretrainConfig(training=None)


def test_what_does_not_fit_together_is_refused(
    dense: dict[str, Artifact],
    tokenizer: Artifact,
    tokens: dict[str, Artifact],
    run_task: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="made for the family 'seq2seq', the model is 'causal'"):
        run_task(pretrain, pretrain_config("causal"), tokenizer, tokens["seq2seq"])
    short = {**toys.LLAMA, "max_position_embeddings": 8}
    cfg = PretrainConfig(model={"settings": short}, training=FAST)
    with pytest.raises(InputError, match="positions for 8"):
        run_task(pretrain, cfg, tokenizer, tokens["causal"])
    mixed = toys.tokens_artifact(tmp_path / "mixed")
    longest = int(TokenReader(mixed.file("train.arrow")).lengths.max())
    with TokenWriter(mixed.file("test.arrow")) as writer:  # the test rows alone are longer
        prompt, answer = np.full(longest, 5, np.int32), np.full(1, 2, np.int32)
        row = TokenRow(prompt, answer, np.zeros(0, np.int32))
        writer.write(row, example=0, characters=1, size=1)
    cfg = PretrainConfig(
        model={"settings": {**toys.LLAMA, "max_position_embeddings": longest}}, training=FAST
    )
    with pytest.raises(InputError, match=f"positions for {longest}"):
        run_task(pretrain, cfg, tokenizer, mixed)
    none = toys.tokens_artifact(tmp_path / "none", rows=0)
    with pytest.raises(StepError, match="no training rows"):
        run_task(sparse_finetune_text, sparse_config(), dense["causal"], none, None, None)
    with pytest.raises(StepError, match="did you mean 'model"):
        cfg = sparse_config(skip=("model.layers.O",))
        run_task(sparse_finetune_text, cfg, dense["causal"], tokens["causal"], None, None)
    speech = {"family": "speech", "architecture": "whisper"}
    with pytest.raises(InputError, match="made for the family 'causal', the model is 'speech'"):
        run_task(pretrain, PretrainConfig(model=speech), tokenizer, tokens["causal"])


def test_a_sparse_bundle_is_not_trained_dense(
    dense: dict[str, Artifact], tokens: dict[str, Artifact], run_task: Any
) -> None:
    cfg = sparse_config(method="magnitude", training=None)
    sparse = run_task(sparse_finetune_text, cfg, dense["causal"], tokens["causal"], None, None)
    with pytest.raises(InputError, match="would fill its zeros"):
        run_task(finetune, FinetuneConfig(), sparse, tokens["causal"])

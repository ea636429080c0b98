"""Every shipped YAML is loaded against its class, and its plan can be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.config_file import load_config
from goldcrest.cluster.dag import Step, walk
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.keys import Fingerprints
from goldcrest.cluster.placement import trainings
from goldcrest.cluster.profile import NodeKind, Profile, check_placement
from goldcrest.pipelines import language, speaker

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "speaker").glob("*.yaml")), ids=lambda p: p.stem)
def test_speaker_configs_load_and_build(path: Path) -> None:
    cfg = load_config(speaker.Config, file=path)
    nodes = speaker.build(cfg)
    assert len(nodes) == len(cfg.compare) + 3  # and the three bundles


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "language").glob("*.yaml")), ids=lambda p: p.stem
)
def test_language_configs_load_and_build(path: Path) -> None:
    cfg = load_config(language.Config, file=path)
    levels = () if cfg.sparse is None else cfg.sparse.levels
    quantized = [each for each in (cfg.int8, cfg.int4) if each is not None]
    assert len(language.build(cfg)) == 1 + len(levels) + len(quantized)


def walked(built: list[Any], **more: Any) -> list[Step]:
    return walk(built, fingerprints=Fingerprints(Path("/nowhere")), **more)


def language_steps(**changes: Any) -> dict[str, Step]:
    built = language.build(language.Config(**changes))
    return {step.name: step for step in walked(built)}


def test_pruning_and_quantization_calibrate_on_a_corpus_of_their_own() -> None:
    """What is trained, distilled and measured stays the task's."""
    task, other = language_steps(), language_steps(calibration_corpus={})
    assert set(other) - set(task) == {"calibration_corpus", "calibration_tokens"}
    assert other["calibration_tokens"].inputs["corpus"] == "calibration_corpus"
    for name in ("sparse_50", "int4"):
        assert task[name].inputs["calibration"] is None
        assert other[name].inputs == task[name].inputs | {"calibration": "calibration_tokens"}
    assert (task["int8"].inputs["tokens"], other["int8"].inputs["tokens"]) == (
        "tokens",
        "calibration_tokens",
    )
    changed = {name for name in task if task[name].key != other[name].key}
    assert changed.isdisjoint({"corpus", "tokenizer", "tokens", "pretrain", "finetune"})


def test_calibration_tokens_without_their_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration_tokens is set, but calibration_corpus is"):
        language.Config(calibration_tokens={"length": 64})
    with pytest.raises(ValueError, match=r"calibration_tokens\.family is seq2seq"):
        language.Config(calibration_corpus={}, calibration_tokens={"family": "seq2seq"})


def test_a_corpus_that_nothing_reads_is_refused() -> None:
    taken = {
        "pretrain": {"model": {"path": "/models/mine"}, "training": None},
        "tokenizer": {"method": "load", "path": "/models/mine"},
    }
    with pytest.raises(ValueError, match=r"pretrain_corpus is set, but pretrain\.training is null"):
        language.Config(**taken, pretrain_corpus={})
    # A config whose model is replaced on the command line keeps its rows of pretraining.
    assert language.Config(**taken, pretrain_tokens={"length": 64}).pretrain_tokens.length == 64


def test_metrics_of_answers_that_nobody_writes_are_refused() -> None:
    model = {"model": {"family": "masked", "architecture": "bert", "settings": {}}}
    rows = {"tokens": {"family": "masked"}, "pretrain_tokens": {"family": "masked"}}
    given = {"pretrain": model, **rows, "int8": None, "int4": None}
    assert language.Config(**given).evaluate.metrics == ()
    with pytest.raises(ValueError, match=r"evaluate\.metrics are bleu, but a model of family mask"):
        language.Config(**given, evaluate={"metrics": ["bleu"]})


def test_every_bundle_of_a_run_tells_of_its_own_model() -> None:
    with pytest.raises(ValueError, match=r"publish\.name is 'dense', but a run publishes several"):
        language.Config(publish={"name": "dense"})


@pytest.mark.parametrize("made", ["int8", "int4"])
def test_what_is_quantized_must_be_a_model_of_the_run(made: str) -> None:
    """Which one matters only where something is quantized."""
    source = {f"{made}_of": "sparse_99"}
    with pytest.raises(ValueError, match=rf"{made}_of is 'sparse_99'.*or leave it out: -o {made}="):
        language.Config(**source)
    assert getattr(language.Config(**source, **{made: None}), made) is None


@pytest.mark.parametrize("profile", ["gpu-node", "mixed", "kuberay"])
@pytest.mark.parametrize(
    "path",
    sorted(path for kind in ("speaker", "language") for path in (CONFIGS / kind).glob("*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_gpu_profiles_have_a_place_for_every_step(
    path: Path, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every training of a config that asks for GPUs, or is given them, is on a GPU node."""
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "sst2" / "tokenizer"  # what `sst2-students` takes from
    teacher.mkdir(parents=True)
    (teacher / "tokenizer.json").touch()
    placed = Profile.load(CONFIGS / "cluster" / f"{profile}.yaml")
    pipeline = {"speaker": speaker, "language": language}[path.parent.name]
    built = pipeline.build(load_config(pipeline.Config, file=path))
    steps = walked(built, overrides=placed.overrides())
    cpu = NodeKind(name="cpu", cpus=8, memory=64 * 10**9, labels={"pool": "cpu"})
    gpu = NodeKind(name="gpu", cpus=8, gpus=4, memory=64 * 10**9, labels={"pool": "gpu"})
    check_placement(steps, [gpu] if profile == "gpu-node" else [cpu, gpu], placed)
    trained = {step.name: [each.gpus for each, _ in trainings(step)] for step in steps}
    assert all(gpus > 0 for each in trained.values() for gpus in each), trained


def test_one_change_to_a_training_leaves_the_rest_of_it() -> None:
    changed = load_config(speaker.Config, overrides=["pretrain.training.epochs=3"])
    standing = speaker.Config().pretrain.training
    assert changed.pretrain.training == standing.model_copy(update={"epochs": 3})
    assert (standing.batch_size, standing.optimizer) == (200, "adam")
    rows = load_config(language.Config, overrides=["pretrain_tokens.length=64"]).pretrain_tokens
    assert (rows.length, rows.pack) == (64, "everything")


def test_a_model_of_ones_own_takes_the_place_of_the_configs() -> None:
    """As the README has it; the tokenizer has to come along."""
    file = CONFIGS / "language" / "compress.yaml"
    model = "pretrain.model={path: /models/mine}"
    cfg = load_config(
        language.Config,
        file=file,
        overrides=[model, "tokenizer={method: load, path: /models/mine}"],
    )
    assert cfg.pretrain.model.source == cfg.tokenizer.path == "/models/mine"
    with pytest.raises(InputError, match=r"tokenizer to \{method: load, path: /models/mine\}"):
        load_config(language.Config, file=file, overrides=[model, "tokenizer={method: bpe}"])


def test_the_variants_are_there() -> None:
    names = {path.stem for path in (CONFIGS / "speaker").glob("*.yaml")}
    assert {"tiny", "base", "paper", "real"} <= names
    names = {path.stem for path in (CONFIGS / "language").glob("*.yaml")}
    assert {"tiny", "base", "compress", "e2e"} <= names
    assert any(name.startswith("paper-") for name in names)


# Kurtic et al., section 4: (epochs, learning rate) by percent of zeros.
GRADUAL = (50, 67, 75, 80, 83, 86, 88, 90)
GSM8K = {40: (2, 3e-5), 50: (2, 3e-5), 60: (2, 1e-4), 70: (4, 8e-5), 80: (4, 1e-4)}
STUDY: dict[str, dict[str, Any]] = {
    "paper-t5-wmt14": {
        "levels": dict.fromkeys(GRADUAL, (3, 2e-3)), "batch": 128, "warmup": 300, "decay": 1e-4,
        "rows": 512, "damping": 1.0, "weights": (1.0, 1.0), "precision": "fp32",
    },
    "paper-whisper-hindi": {
        "levels": dict.fromkeys(GRADUAL, (6, 2e-4)), "batch": 32, "warmup": 50, "decay": 1e-4,
        "rows": 512, "damping": 1.0, "weights": (0.5, 1.0), "precision": "fp32",
    },
    "paper-mpt-gsm8k": {
        "levels": GSM8K, "batch": 32, "warmup": 20, "decay": 0.0,
        "rows": 128, "damping": 0.01, "weights": (1.0, 1.0), "precision": "bf16",
    },
    "paper-llama2-gsm8k": {
        "levels": GSM8K, "batch": 32, "warmup": 20, "decay": 0.0,
        "rows": 128, "damping": 0.01, "weights": (1.0, 1.0), "precision": "bf16",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(STUDY))
def test_the_studys_configs_have_the_studys_numbers(name: str) -> None:
    cfg = load_config(language.Config, file=CONFIGS / "language" / f"{name}.yaml").sparse
    study = STUDY[name]
    assert cfg is not None
    assert cfg.gradual == (tuple(study["levels"]) == GRADUAL)
    assert tuple(round(100 * level) for level in cfg.levels) == tuple(study["levels"])
    for level, (epochs, rate) in zip(cfg.levels, study["levels"].values(), strict=True):
        step = cfg.step(level)
        training = step.training
        assert training is not None
        assert (training.epochs, training.learning_rate) == (epochs, rate)
        assert (training.batch_size, training.warmup_steps) == (study["batch"], study["warmup"])
        assert (training.schedule, training.weight_decay) == ("linear", study["decay"])
        assert (training.precision, training.clip_norm) == (study["precision"], None)
        assert (step.method, step.distillation) == ("sparsegpt", "squarehead")
        assert (step.calibration_rows, step.settings["damping"]) == (
            study["rows"],
            study["damping"],
        )
        assert (step.task_weight, step.distillation_settings["weight"]) == study["weights"]
        assert step.settings["block"] == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrain": {"margin": "ce"}}, "must be the same"),
        ({"compare": [{"method": "cimc"}]}, "called alike"),
        ({"rounds": 2, "pretrain": {"labels": True}}, "once on true labels"),
        ({"clustering": {"clusters": 1}}, "greater than or equal to 2"),
        ({"features": {"augment": {"speed": [1.1, 0.9]}}}, "a range is"),
        ({"sparse": {"skip": ["emded"]}}, r"'sparse.skip': no layer is .* did you mean 'embed'"),
        ({"sparse": {"skip": ["layers.3"]}}, "'sparse.skip': no layer is called 'layers.3'"),
        ({"sparse": {"skip": ["embed_norm"]}}, "no layer is called 'embed_norm'"),
        (
            {"quantize": {"settings": {"skip_names": ["layers.9.enter"]}}},
            "'quantize.settings.skip_names': cannot skip layers.9.enter",
        ),
        ({"pretrain": {"margin": "ce", "margin_warmup": 2}}, "margin_warmup is 2.*'ce' has no"),
        ({"sparse": {"margin": "ocsoftmax", "margin_warmup": 1}}, "'ocsoftmax' has no"),
    ],
)
def test_configs_that_would_fail_late_are_refused_early(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        speaker.Config(**change)


def test_skipped_layers_are_looked_up_in_the_network_of_the_config() -> None:
    skips = {"skip": ["layers.3", "enter.conv", "pooling"]}
    network = {"network": {"dilations": [2, 3, 4, 5]}}
    cfg = speaker.Config(sparse=skips, pretrain=network)
    assert cfg.sparse.skip == ("layers.3", "enter.conv", "pooling")
    int8 = {"settings": {"skip_names": ["layers.3.enter", "embed"]}}
    assert speaker.Config(quantize=int8, pretrain=network).quantize.settings["skip_names"]


LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BLOOM = {"architecture": "bloom", "settings": {"hidden_size": 64, "n_layer": 1, "n_head": 4}}
EXPERTS = {**LLAMA, "num_local_experts": 2}
ALONE: dict[str, Any] = {"sparse": None, "int8": None, "int4": None}


def compressed(model: dict[str, Any], **parts: Any) -> language.Config:
    return language.Config(**{"pretrain": {"model": model}, **ALONE, **parts})


@pytest.mark.parametrize(
    ("model", "parts", "words"),
    [
        (
            {"settings": LLAMA},
            {"int4": {"group_sizes": [32, 64]}},
            r"field 'int4': no group size fits this model: groups of 32 do not .* ragged to true",
        ),
        (
            {"settings": LLAMA},
            {"int4": {"high_precision": ["layers.0"], "ragged": True}},
            "field 'int4': high_precision: no layer of a block is called 'layers.0'",
        ),
        (
            {"settings": LLAMA},
            {"sparse": {"levels": [0.5], "recipe": {"settings": {"pattern": [4, 8]}}}},
            r"field 'sparse': pruning by sparsegpt to 50%: a pattern of 4:8 does not divide the "
            r"inputs of 1 of 7 layers: model\.layers\.0\.mlp\.down_proj has 60",
        ),
        (
            {"settings": LLAMA},
            {"sparse": {"recipe": {"skip": ["model.layers.0.mlp.down"]}}},
            "field 'sparse': .* did you mean 'model.layers.0.mlp.down_proj'",
        ),
        (
            {"settings": LLAMA},
            {"int8": {"settings": {"skip_names": ["model.layers.1.mlp"]}}},
            "field 'int8': .* cannot skip 'model.layers.1.mlp': no operation is called so",
        ),
        (
            {"architecture": "mixtral", "settings": EXPERTS},
            {"sparse": {}},
            "field 'sparse': .* take a model without experts",
        ),
        (
            BLOOM,
            {"int8": {}},
            "field 'int8': the model can't be quantized .*; set settings.attention to false",
        ),
    ],
)
def test_models_that_can_not_be_compressed_are_refused_before_they_are_trained(
    model: dict[str, Any], parts: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compressed(model, **parts)


def test_what_fits_the_models_layers_is_let_through() -> None:
    pattern = {"settings": {"pattern": [4, 8]}, "skip": ["model.layers.0.mlp.down_proj"]}
    compressed({"settings": LLAMA}, sparse={"levels": [0.5], "recipe": pattern})
    compressed({"settings": LLAMA}, int4={"group_sizes": [64, -1]})
    compressed({"settings": LLAMA}, int4={"group_sizes": [64], "ragged": True})
    compressed(BLOOM, int8={"settings": {"attention": False}}, int4={"group_sizes": [64]})
    compressed({"architecture": "mixtral", "settings": EXPERTS})


def test_a_trained_models_layers_are_looked_at_in_its_folder(tmp_path: Path) -> None:
    """What can't be looked at (a name on the hub, a folder that is no model's) its steps check."""
    values = {"model_type": "llama", "vocab_size": 64, **LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(values))
    given = {"pretrain": {"training": None, "model": {"path": str(tmp_path)}}}
    given["tokenizer"] = {"method": "load", "path": str(tmp_path)}
    with pytest.raises(ValueError, match="field 'int4': no group size fits this model"):
        language.Config(**given)
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": 128}))
    with pytest.raises(ValueError, match=r"mlp.down_proj has 60 \(only -1 fits"):
        language.Config(**given)
    for text in ("{}", "[]", "", json.dumps({**values, "model_type": "t5"})):
        (tmp_path / "config.json").write_text(text)
        language.Config(**given)
    compressed({"hub": "owner/name"}, int4={"group_sizes": [1024]})


def test_layers_that_were_found_once_are_looked_up_without_torch() -> None:
    """A run that is wholly cached must not pay for the import."""
    make = (
        "speaker.Config(sparse={'skip': ['embed']}, quantize={'settings': {'skip_names': []}}); "
        "language.Config()"
    )
    imports = "from goldcrest.pipelines import language, speaker"
    code = f"import sys; {imports}; {make}; print(*sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert "torch" not in runs[1].stdout.split()


def test_every_field_is_documented() -> None:
    """Descriptions carry the unit; a field without one is not finished."""
    from goldcrest.cluster.api import Config

    seen: set[type] = set()

    def check(cls: type[Config]) -> None:
        if cls in seen:
            return
        seen.add(cls)
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                check(field.annotation)

    check(speaker.Config)
    check(language.Config)
    assert len(seen) > 16


def test_rounds_and_candidates_have_names_and_labels_of_their_own() -> None:
    base = load_config(speaker.Config, file=CONFIGS / "speaker" / "tiny.yaml").model_dump()
    two = base | {"rounds": 2, "candidates": {"changes": [{}, {"mu": 2.0}], "seeds": 2}}
    cfg = speaker.Config.model_validate(two)
    steps = walk(speaker.build(cfg), fingerprints=Fingerprints(Path("/nowhere/cache")))
    clusterings = [step for step in steps if step.task.name == "cluster"]
    assert len([step for step in clusterings if step.name.startswith("candidate")]) == 8
    assert {"cluster", "cluster-round-2", "reference-round-2"} <= {step.name for step in steps}
    labels = [step.config.label or step.config.method for step in clusterings]  # type: ignore[attr-defined]
    assert len(set(labels)) == len(labels)
    with pytest.raises(ValueError, match="nu"):
        speaker.Config.model_validate(base | {"candidates": {"changes": [{"nu": 1}]}})

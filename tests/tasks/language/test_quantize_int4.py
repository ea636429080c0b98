"""The INT4 step on a small trained model: what it finds, writes, refuses and goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from goldcrest.cluster.api import InputError, StepError
from goldcrest.cluster.artifact import Artifact, Output, describe_files
from goldcrest.cluster.runtime import LocalRuntime, RayRuntime
from goldcrest.kernels.language.architectures import own_state
from goldcrest.kernels.language.stacks import block_linears
from goldcrest.kernels.weight_only.checkpoint import from_checkpoint
from goldcrest.kernels.weight_only.linear import WeightOnlyLinear
from goldcrest.kernels.weight_only.transformer import Options, quantized_layers
from goldcrest.tasks.data.tokens import TokenRow, TokenWriter, cut
from goldcrest.tasks.language.bundle import load_bundle, load_model, write_bundle, zero_share
from goldcrest.tasks.language.collator import Collator
from goldcrest.tasks.language.int4_trials import PIECED_ROWS, Material, measure, pieced_loss
from goldcrest.tasks.language.quantize_int4 import Int4Config, quantize_int4
from tests.kernels.language import tiny_models

QUICK = {"calibration": 6, "calibration_length": 24, "evaluation": 20, "batch_tokens": 256}


def sequences(count: int, seed: int, length: int = 24) -> list[np.ndarray]:
    """Text whose next token mostly follows from the last one: something to learn quickly."""
    rng = np.random.default_rng(seed)
    following = np.random.default_rng(0).permutation(61) + 3
    rows = []
    for _ in range(count):
        row = [int(rng.integers(3, 64))]
        while len(row) < length:
            row.append(int(following[row[-1] - 3] if rng.random() < 0.8 else rng.integers(3, 64)))
        rows.append(np.array(row, np.int32))
    return rows


def artifact(folder: Path, step: str, files: int = 0) -> Artifact:
    """A folder as an artifact, its manifest made from what lies in it."""
    manifest = {
        "key": f"{files:064x}",
        "step": step,
        "files": describe_files(folder),
        "metrics": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.at(folder)


def tokens(folder: Path, *, train: int = 12, validation: int = 24, plain: bool = True) -> Artifact:
    folder.mkdir(parents=True)
    for place, (split, count) in enumerate({"train": train, "validation": validation}.items()):
        with TokenWriter(folder / f"{split}.arrow") as writer:
            for number, row in enumerate(sequences(count, place)):
                head = 0 if plain else 10
                made = TokenRow(row[:head], row[head : 24 - number % 3])
                writer.write(made, example=number, characters=len(row), size=len(row))
    return artifact(folder, "tokens")


def bundle(folder: Path, model: Any, family: str = "causal", **facts: Any) -> Artifact:
    source = folder.parent / f"{folder.name}-tokenizer"
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", mask_token="w3",
    ).save_pretrained(source)  # fmt: skip
    folder.mkdir(parents=True)
    write_bundle(
        Output(folder, runtime=LocalRuntime()), name="dense", family=family, config=model.config,
        tensors=own_state(model), tokenizer=source, facts=facts,
    )  # fmt: skip
    return artifact(folder, "finetune")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int4")


@pytest.fixture(scope="module")
def dense(place: Path) -> Artifact:
    """A small Llama, trained long enough that rounding its weights shows."""
    torch.manual_seed(0)
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    rows = torch.from_numpy(np.stack(sequences(256, 7))).long()
    for step in range(60):
        batch = rows[32 * (step % 8) : 32 * (step % 8 + 1)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bundle(place / "dense", model.eval())


@pytest.fixture(scope="module")
def rows(place: Path) -> Artifact:
    return tokens(place / "tokens")


Run = Callable[..., Artifact]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(config, model, tokens, calibration)` -> the artifact; `runtime`, `scratch`: optional."""
    count = 0

    def run_once(
        cfg: dict[str, Any],
        model: Artifact,
        given: Artifact,
        calibration: Artifact | None = None,
        *,
        runtime: Any = None,
        scratch: Path | None = None,
    ) -> Artifact:
        nonlocal count
        count += 1
        folder = tmp_path / f"out-{count}"
        folder.mkdir()
        out = Output(
            folder, runtime=runtime or LocalRuntime(), seed=3,
            scratch=scratch or tmp_path / f"scratch-{count}",
        )  # fmt: skip
        quantize_int4(Int4Config(**{**QUICK, **cfg}), model, given, calibration, out=out)
        made = artifact(folder, "quantize_int4")
        made.manifest = {**made.manifest, "metrics": out.collected_metrics,
                         "measurements": out.measurements}  # fmt: skip
        return made

    return run_once


class Ahead(LocalRuntime):
    """Runs everything that it is given at once, the last item first; results come in order."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], **_: Any) -> Iterator[Any]:
        given = list(items)
        results = {len(given) - 1 - n: function(item) for n, item in enumerate(reversed(given))}
        yield from (results[n] for n in range(len(given)))


class Killed(LocalRuntime):
    """Dies after some items of a map."""

    def __init__(self, after: int) -> None:
        self.after, self.done = after, 0

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            if self.done == self.after:
                raise KeyboardInterrupt
            self.done += 1
            yield function(item)


def test_finds_the_smallest_recipe_within_the_tolerance(
    run: Run, dense: Artifact, rows: Artifact
) -> None:
    """The bundle loads, computes with codes, and has the metric that was reported."""
    made = run(
        {"methods": {"rtn": {}, "gptq": {}}, "group_sizes": [64, 32], "tolerance": 0.05},
        dense,
        rows,
    )
    told = made.metrics["int4"]
    assert describe_files(dense.path).items() >= dense.manifest["files"].items()  # as it was
    assert told["within_tolerance"]
    assert told["relative_loss"] <= 0.05
    assert told["relative_loss"] == pytest.approx(
        (told["perplexity"] - told["float"]["perplexity"]) / told["float"]["perplexity"]
    )
    loaded = load_bundle(made.path)
    layers = quantized_layers(loaded.model)
    assert list(layers) == block_linears(load_model(dense.path))
    assert isinstance(loaded.model.lm_head, torch.nn.Linear)
    material = Material(
        bundle=dense.path, train=rows.file("train.arrow"), validation=rows.file("validation.arrow"),
        calibration=6, length=24, evaluation=20, batch_tokens=256,
        collate=Collator(family="causal", pad=0), seed=3,
        options=Options(), device="cpu", scratch=made.path,
    )  # fmt: skip
    again = measure(loaded.model, material.evaluation_batches(), "causal")
    assert again["perplexity"] == told["perplexity"]
    assert pieced_loss(loaded.model, material) == told["decoding"]["loss"]
    assert abs(told["decoding"]["relative_perplexity_loss"]) < 0.06
    assert loaded.facts["bits"] == 4
    record = loaded.facts["recipe"]
    assert record["within_tolerance"] is True
    assert record["algorithm"] in ("rtn", "gptq")
    assert {"calibration", "metric", "baseline", "relative_loss", "bytes", "libraries",
            "group_size", "scheme", "scale_dtype", "high_precision"} <= set(record)  # fmt: skip
    table = made.table("trials").to_pylist()
    assert [row["chosen"] for row in table].count(True) == 1
    assert table[-1]["chosen"]  # the search stopped there
    assert all(row["relative_loss"] > 0.05 for row in table[:-1])
    assert "figures/trials.png" in made
    for measured in (made.manifest["measurements"]["int4"],
                     made.manifest["measurements"]["int4"]["float"]):  # fmt: skip
        assert measured["next_token_ms"] > 0
    small = made.file("model.safetensors").stat().st_size
    assert small < 0.5 * dense.file("model.safetensors").stat().st_size
    assert told["share_of_float32"] < 0.2


@pytest.mark.parametrize("plain", [True, False])
def test_pieces_behind_a_cache_are_the_whole_row(
    plain: bool, dense: Artifact, tmp_path: Path
) -> None:
    """Of a float model; with a prompt, only the answer counts."""
    made = tokens(tmp_path / "tokens", plain=plain)
    paths = {name: made.file(f"{name}.arrow") for name in ("train", "validation")}
    material = Material(
        bundle=dense.path, **paths, calibration=6, length=24, evaluation=PIECED_ROWS,
        batch_tokens=24, collate=Collator(family="causal", pad=0), seed=3, options=Options(),
        device="cpu", scratch=tmp_path,
    )  # fmt: skip
    model = material.load()
    whole = measure(model, material.evaluation_batches(), "causal")
    assert pieced_loss(model, material) == pytest.approx(whole["loss"], rel=1e-5)


def test_how_far_workers_run_ahead_changes_nothing(
    run: Run, dense: Artifact, rows: Artifact
) -> None:
    """The same files to the last byte, whoever finishes first."""
    cfg = {"methods": {"rtn": {}, "awq": {"steps": 3}, "autoround": {"iterations": 3}},
           "group_sizes": [64], "tolerance": 0.02}  # fmt: skip
    one = run(cfg, dense, rows)
    two = run(cfg, dense, rows, runtime=Ahead())
    assert one.manifest["files"] == two.manifest["files"]
    assert one.metrics == two.metrics


def test_goes_on_after_the_trials_that_were_finished(
    run: Run, dense: Artifact, rows: Artifact, tmp_path: Path
) -> None:
    cfg = {"methods": {"rtn": {}, "gptq": {}, "awq": {"steps": 2}}, "group_sizes": [64], "bits": 2,
           "tolerance": 0.0, "max_trials": 3}  # fmt: skip
    whole = run(cfg, dense, rows)
    scratch = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        run(cfg, dense, rows, runtime=Killed(after=3), scratch=scratch)  # float model, two trials
    assert len(list((scratch / "trials").glob("*.json"))) == 2
    assert len(list((scratch / "trials").glob("*.safetensors"))) == 1  # of the better one
    first = next((scratch / "trials").glob("*.json")).stat().st_mtime_ns
    again = run(cfg, dense, rows, scratch=scratch)
    assert again.manifest["files"] == whole.manifest["files"]
    assert next((scratch / "trials").glob("*.json")).stat().st_mtime_ns == first


def test_spares_sensitive_layers_when_no_recipe_passes(
    run: Run, dense: Artifact, rows: Artifact
) -> None:
    """2 bits are too few: then 8 bits for some layers, or float ones; the best of all is kept."""
    made = run(
        {"methods": {"rtn": {}}, "group_sizes": [64], "bits": 2, "tolerance": 0.0, "max_spared": 4},
        dense, rows,
    )  # fmt: skip
    names = [row["recipe"] for row in made.table("trials").to_pylist()]
    assert names[:3] == ["rtn g64 asym", "rtn g64 asym + 1 at 8 bits", "rtn g64 asym + 2 at 8 bits"]
    assert len(names) <= 7
    losses = [row["relative_loss"] for row in made.table("trials").to_pylist()]
    assert made.metrics["int4"]["relative_loss"] == min(losses) < losses[0]
    assert (
        "at 8 bits" in made.metrics["int4"]["recipe"] or "float" in made.metrics["int4"]["recipe"]
    )
    load_model(made.path)
    told = made.table("sensitivities").to_pylist()
    errors = [row["relative_error"] for row in told]
    assert errors == sorted(errors, reverse=True)
    model = load_model(dense.path)
    assert {row["layer"]: row["weights"] for row in told} == {
        name: model.get_submodule(name).weight.numel() for name in block_linears(model)
    }
    assert "figures/sensitivities.png" in made
    (spared, *_) = (row for row in made.json("trials")["trials"] if len(row["eight_bits"]) == 1)
    assert spared["eight_bits"] == [told[0]["layer"]]
    few = run({"methods": {"rtn": {}}, "group_sizes": [64], "bits": 2, "tolerance": 0.0,
               "max_trials": 2}, dense, rows)  # fmt: skip
    assert few.metrics["int4"]["trials"] == 2
    assert not few.metrics["int4"]["within_tolerance"]


def test_group_sizes_that_do_not_fit_are_left_out_or_refused(
    run: Run, dense: Artifact, rows: Artifact, tmp_path: Path
) -> None:
    made = run({"methods": {"rtn": {}}, "group_sizes": [128, 64], "tolerance": 9.0}, dense, rows)
    left_out = made.json("trials")["group_sizes_left_out"]
    assert "groups of 128 do not divide the inputs of 12 of 14 layers" in left_out["128"]
    assert "g = 64 fits" in left_out["128"]
    with pytest.raises(InputError, match=r"q_proj has 64 \(g = 64 fits, or -1\)") as raised:
        run({"methods": {"rtn": {}}, "group_sizes": [256]}, dense, rows)
    assert "ragged" in str(raised.value)
    assert not list((tmp_path / "out-2").iterdir())


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_exports_are_the_model_that_was_found(
    layout: str, run: Run, dense: Artifact, rows: Artifact
) -> None:
    made = run(
        {"methods": {"teq": {"steps": 2}}, "group_sizes": [32], "scale_dtype": "float16",
         "tolerance": 9.0, "exports": [layout], "high_precision": ["model.layers.0.mlp"]},
        dense, rows,
    )  # fmt: skip
    config = made.json(f"{layout}/quantize_config")
    assert made.json(f"{layout}/config")["quantization_config"] == config
    weights, rest = from_checkpoint(load_file(made.file(f"{layout}/model.safetensors")), config)
    model = load_model(made.path)
    layers = quantized_layers(model)
    assert set(weights) == set(layers)
    for name, layer in layers.items():
        assert torch.equal(weights[name].effective(), layer.quantized().effective())
    assert torch.equal(rest["model.layers.0.mlp.up_proj.weight"],
                       model.model.layers[0].mlp.up_proj.weight)  # fmt: skip
    # The folder alone is what another runtime loads.
    folder = made.path / layout
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    assert words("w5")["input_ids"] == [5]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == model.config.eos_token_id
    named = config.get("dynamic", config.get("modules_to_not_convert"))
    assert any("layers" in each and "up_proj" in each for each in named)


def test_an_export_that_no_loader_takes_is_refused_before_any_trial(
    run: Run, rows: Artifact, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    conv = bundle(tmp_path / "conv", tiny_models.gpt2(n_layer=1).eval())
    cfg = {"methods": {"rtn": {}}, "group_sizes": [32], "scale_dtype": "float16"}
    with pytest.raises(
        InputError, match=r"exports: .* 'transformer\.h\.0\.attn\.c_attn' is a Conv1D"
    ):
        run({**cfg, "exports": ["gptq", "awq"]}, conv, rows)
    assert not list((tmp_path / "out-1").iterdir())


@pytest.mark.parametrize(("architecture", "family"), [("t5", "seq2seq"), ("bert", "masked")])
def test_encoder_decoders_and_encoders(
    architecture: str, family: str, run: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture](
        **({"num_layers": 1} if architecture == "t5" else {"num_hidden_layers": 1})
    ).eval()
    made = run(
        {"methods": {"gptq": {}}, "group_sizes": [32], "ragged": True, "metric": "accuracy",
         "tolerance": 9.0},
        bundle(tmp_path / "dense", model, family),
        tokens(tmp_path / "tokens", plain=False),
    )  # fmt: skip
    assert made.metrics["int4"]["perplexity"] > 1
    loaded = load_model(made.path)
    assert all(isinstance(loaded.get_submodule(n), WeightOnlyLinear) for n in block_linears(model))


def test_a_masked_model_is_not_asked_for_special_tokens(rows: Artifact, tmp_path: Path) -> None:
    """Ends and beginnings of texts say nothing of how well a model knows the language."""
    dense = bundle(tmp_path / "dense", tiny_models.bert(num_hidden_layers=1).eval(), "masked")
    material = Material(
        bundle=dense.path, train=rows.file("train.arrow"), validation=rows.file("validation.arrow"),
        calibration=6, length=24, evaluation=20, batch_tokens=256, seed=3, options=Options(),
        collate=Collator(family="masked", pad=0, mask=3, special=tuple(range(40))), device="cpu",
        scratch=tmp_path,
    )  # fmt: skip
    for batch in material.evaluation_batches() + material.calibration_batches():
        asked = batch["labels"][batch["labels"] >= 0]
        assert len(asked) and bool((asked >= 40).all())


def test_the_special_tokens_are_the_tokenizers(
    run: Run, rows: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    batches = Material.evaluation_batches

    def watched(self: Material) -> Any:
        seen.append(self.collate.special)
        return batches(self)

    monkeypatch.setattr(Material, "evaluation_batches", watched)
    model = tiny_models.bert(num_hidden_layers=1).eval()
    run({"methods": {"rtn": {}}, "group_sizes": [-1], "tolerance": 9.0},
        bundle(tmp_path / "dense", model, "masked"), rows)  # fmt: skip
    assert seen and set(seen) == {(0, 3)}


def test_a_context_that_is_shorter_than_the_latencies_want(
    run: Run, rows: Artifact, tmp_path: Path
) -> None:
    """Learned positions end at 24, where rows end too."""
    model = tiny_models.gpt2(n_layer=1, n_positions=24).eval()
    made = run({"methods": {"rtn": {}}, "group_sizes": [-1], "tolerance": 9.0},
               bundle(tmp_path / "dense", model), rows)  # fmt: skip
    assert made.manifest["measurements"]["int4"]["next_token_ms"] > 0


def test_rows_beyond_the_models_positions_are_refused(
    run: Run, rows: Artifact, tmp_path: Path
) -> None:
    """Those to calibrate on after they were cut, those to measure on whole."""
    cfg = {"methods": {"rtn": {}}, "group_sizes": [-1], "tolerance": 9.0}
    short = bundle(tmp_path / "short", tiny_models.gpt2(n_layer=1, n_positions=20).eval())
    with pytest.raises(InputError, match=r"a row has 24 tokens, .* positions for 20") as raised:
        run(cfg, short, rows)
    assert "lower calibration_length to 20" in str(raised.value)
    with pytest.raises(InputError, match=r"a row has 24 tokens, .* positions for 20") as raised:
        run({**cfg, "calibration_length": 20}, short, rows)
    assert "lower tokens.length" in str(raised.value)


def test_what_ends_a_text_is_kept(run: Run, rows: Artifact, tmp_path: Path) -> None:
    """Chat models end at several tokens, which only generation_config.json names."""
    model = tiny_models.llama(num_hidden_layers=1).eval()
    dense = bundle(tmp_path / "dense", model)
    known = json.loads(dense.file("generation_config.json").read_text())
    (dense.path / "generation_config.json").write_text(
        json.dumps({**known, "eos_token_id": [2, 7], "suppress_tokens": [5]})
    )
    made = run({"methods": {"rtn": {}}, "group_sizes": [-1], "tolerance": 9.0},
               artifact(dense.path, "finetune"), rows)  # fmt: skip
    found = load_model(made.path).generation_config
    assert found.eos_token_id == [2, 7]
    assert found.suppress_tokens == [5]


def test_calibrates_on_a_corpus_of_its_own(
    run: Run, dense: Artifact, rows: Artifact, tmp_path: Path
) -> None:
    """Measured on the task's validation rows all the same."""
    cfg = {"methods": {"gptq": {}}, "group_sizes": [64]}
    other = tokens(tmp_path / "other", train=5, validation=3)
    mixed = tmp_path / "mixed"
    shutil.copytree(rows.path, mixed)
    shutil.copyfile(other.path / "train.arrow", mixed / "train.arrow")
    one, two, task = (
        run(cfg, dense, rows, other), run(cfg, dense, artifact(mixed, "tokens")),
        run(cfg, dense, rows),
    )  # fmt: skip
    assert one.file("model.safetensors").read_bytes() == two.file("model.safetensors").read_bytes()
    assert one.metrics == two.metrics != task.metrics
    told = [each.json("bundle")["recipe"] for each in (one, task)]
    assert [(each["calibration"]["set"], each["calibration"]["rows"]) for each in told] == [
        ("calibration corpus", 5), ("train", 6),
    ]  # fmt: skip
    assert [each["metric"]["rows"] for each in told] == [20, 20]
    few = run({**cfg, "calibration": 99, "evaluation": 99}, dense, rows).json("bundle")["recipe"]
    assert (few["calibration"]["rows"], few["metric"]["rows"]) == (12, 24)  # all that there are


def test_how_methods_are_driven_is_set_in_the_config(
    run: Run, dense: Artifact, rows: Artifact
) -> None:
    """GPTQ's order of calibration, and the precision that decoding multiplies in."""
    cfg = {"methods": {"gptq": {}}, "group_sizes": [64], "tolerance": 9.0}
    usual = run(cfg, dense, rows)
    other = run({**cfg, "true_sequential": False, "compute": "float32"}, dense, rows)
    options = [each.json("bundle")["quantization"]["options"] for each in (usual, other)]
    assert options == [
        {"true_sequential": True, "insert_scales": True, "compute": "bfloat16"},
        {"true_sequential": False, "insert_scales": True, "compute": "float32"},
    ]
    first, second = (quantized_layers(load_model(each.path)) for each in (usual, other))
    assert {each.form.compute for each in second.values()} == {"float32"}
    down = "model.layers.0.mlp.down_proj"
    assert not torch.equal(first[down].codes, second[down].codes)


def test_zeros_of_a_sparse_model_stay(run: Run, rows: Artifact, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_models.llama(num_hidden_layers=1).eval()
    names = block_linears(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape) > 0.7)
    sparse = bundle(tmp_path / "sparse", model)
    before = sparse.json("bundle")["sparsity"]
    assert before > 0.1
    cfg = {"methods": {"gptq": {}}, "group_sizes": [-1], "tolerance": 9.0}
    made = run(cfg, sparse, rows)
    found = quantized_layers(load_model(made.path))
    for name in names:
        zeros = model.get_submodule(name).weight == 0
        assert bool((found[name].quantized().effective()[zeros] == 0).all())
    assert made.json("bundle")["sparsity"] == before
    # Where they may be filled the bundle says how many there are.
    filled = run({**cfg, "keep_zeros": False}, sparse, rows)
    model = load_model(filled.path)
    layers = {f"{n}.weight": m.quantized().effective() for n, m in quantized_layers(model).items()}
    told = filled.json("bundle")["sparsity"]
    assert told == zero_share({**dict(model.named_parameters()), **layers}) != before


def test_what_cannot_be_quantized_is_told(
    run: Run, dense: Artifact, rows: Artifact, tmp_path: Path
) -> None:
    small = run({"methods": {"rtn": {}}, "group_sizes": [64], "tolerance": 9.0}, dense, rows)
    with pytest.raises(InputError, match="'int4' is quantized already"):
        run({}, small, rows)
    whisper = bundle(tmp_path / "whisper", tiny_models.whisper(), "speech")
    with pytest.raises(InputError, match="have no features, and a speech model reads audio"):
        run({}, whisper, rows)
    for split, message in (("train", "calibrate on"), ("validation", "measure the model on")):
        empty = tokens(tmp_path / f"no-{split}", **{split: 0})
        with pytest.raises(StepError, match=f"no {split} rows, which are needed to {message}"):
            run({}, dense, empty)
    with pytest.raises(InputError, match=r"high_precision: .* did you mean 'model\.layers\.0"):
        run({"high_precision": ["model.layers.0.self_attn.q_prj"]}, dense, rows)
    experts = bundle(tmp_path / "experts", tiny_models.mixtral())
    with pytest.raises(InputError, match="mixtures of experts can't be compressed"):
        run({"methods": {"rtn": {}}}, experts, rows)
    broken = load_model(dense.path)
    with torch.no_grad():
        broken.model.norm.weight.fill_(3e38)
    with pytest.raises(StepError, match="the float model's metric is nan"):
        run({"methods": {"rtn": {}}}, bundle(tmp_path / "broken", broken), rows)


def test_a_recipe_that_is_refused_is_a_trial_that_failed(
    run: Run, rows: Artifact, tmp_path: Path
) -> None:
    """Scales beyond float16: the error is in the table, another recipe is found, or none."""
    torch.manual_seed(0)
    model = tiny_models.llama(num_hidden_layers=1).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3e7
    huge = bundle(tmp_path / "huge", model)
    cfg = {"methods": {"rtn": {}}, "group_sizes": [-1], "max_spared": 0, "tolerance": 9.0}
    with pytest.raises(StepError, match="weights are too large for scales in float16"):
        run({**cfg, "scale_dtype": "float16"}, huge, rows)
    assert run(cfg, huge, rows).metrics["int4"]["within_tolerance"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"gpqt": {}}}, "did you mean 'gptq'"),
        ({"methods": {"gptq": {"damping": -1}}}, "damping must be at least 0"),
        ({"methods": {}}, "at least 1 item"),
        ({"group_sizes": [48]}, "group sizes are -1, 32, 64, 128, 256, 512, 1024; not 48"),
        ({"schemes": ["symmetric"]}, "asym"),
        ({"exports": ["gptq"]}, "set scale_dtype to float16"),
        ({"exports": ["awq"], "scale_dtype": "float16", "bits": 3}, "the awq layout holds 4 bits"),
        ({"exports": ["gptq"], "scale_dtype": "float16", "bits": 5}, "2, 3, 4, 8 bits, not 5"),
        (
            {
                "exports": ["awq"],
                "scale_dtype": "float16",
                "methods": {"gptq": {"act_order": True}},
            },
            "set gptq.static_groups too",
        ),
        ({"exports": ["awq", "awq"], "scale_dtype": "float16"}, "awq given twice"),
        ({"group_sizes": [64, 32, 64]}, "64 given twice: name each once"),
        ({"schemes": ["sym", "sym"]}, "sym given twice"),
        ({"tolerance": -0.1}, "greater than or equal to 0"),
        ({"max_trials": 0}, "greater than or equal to 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4Config(**changes)


def test_methods_are_completed_with_their_defaults() -> None:
    """A changed default of a kernel changes the key."""
    cfg = Int4Config(methods={"autoround": {"iterations": 50}})
    assert cfg.methods["autoround"]["batch"] == 8
    assert cfg.methods["autoround"]["iterations"] == 50
    assert set(Int4Config().methods) == {"rtn", "gptq", "awq", "teq", "autoround"}


def test_rows_are_cut_on_either_side() -> None:
    row = TokenRow(np.arange(6, dtype=np.int32), np.arange(5, dtype=np.int32))
    assert [len(part) for part in (cut(row, 8, "causal").prompt, cut(row, 8, "causal").answer)] == [
        6, 2,
    ]  # fmt: skip
    short = cut(row, 4, "seq2seq")
    assert (len(short.prompt), len(short.answer)) == (4, 4)
    packed = TokenRow(np.zeros(0, np.int32), np.arange(9, dtype=np.int32), np.array([0, 4, 7]))
    assert cut(packed, 6, "causal").starts.tolist() == [0, 4]


@pytest.mark.slow
def test_trials_on_ray_give_the_same_bundle(
    ray_cluster: None, run: Run, dense: Artifact, rows: Artifact
) -> None:
    """Two workers side by side, one thread each, and this process alone."""
    cfg = {"methods": {"rtn": {}, "gptq": {}, "awq": {"steps": 3}}, "group_sizes": [64, 32],
           "tolerance": 0.01}  # fmt: skip
    remote = run(cfg, dense, rows, runtime=RayRuntime())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(cfg, dense, rows).manifest["files"] == remote.manifest["files"]
    finally:
        torch.set_num_threads(threads)

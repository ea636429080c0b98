"""INT4: the smallest weight-only quantization of a model that keeps its metric within a tolerance.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2 (spec "INT4",
section 3.7): recipes are tried in order, here from the smallest model to the largest; the first
whose relative loss is within the tolerance is kept. Where none is, the best is tried again with its
most sensitive layers on 8 bits or float. Trials run side by side; which recipe is found does not
depend on how many do.

Artifact: the bundle `int4`, `trials` (table and figure), `sensitivities` of the layers (table and
figure) where some were to be spared, and on request `gptq/` and `awq/`, the same model as other
runtimes load it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    InputError,
    Output,
    StepError,
    task,
)
from goldcrest.tasks.language import int4_report, int4_trials
from goldcrest.tasks.language.bundle import (
    float_text_bundle,
    load_bare,
    load_config,
    read_description,
    write_bundle,
    zero_share,
)
from goldcrest.tasks.language.recipe import check_lengths
from goldcrest.tasks.language.rows import check_speech, open_rows, rows_file
from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder
from goldcrest.tasks.methods import complete_method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from goldcrest.kernels.weight_only.search import Recipe, Rule, Trial
    from goldcrest.tasks.language.int4_trials import Material

_METHODS = "goldcrest.kernels.weight_only"
GROUP_SIZES = (-1, 32, 64, 128, 256, 512, 1024)
GPTQ_BITS = (2, 3, 4, 8)  # gptq_layout.BITS, here without torch
Layout = Literal["gptq", "awq"]


class Int4Config(Config):
    """Which recipes are tried, what they may cost, and what they are measured on."""

    methods: dict[str, dict[str, Any]] = Field(
        {"rtn": {}, "gptq": {}, "awq": {}, "teq": {}, "autoround": {}},
        min_length=1,
        description="methods to try, files of kernels/weight_only, with their settings",
    )
    group_sizes: tuple[int, ...] = Field(
        (128, 64, 32),
        min_length=1,
        description="input channels that share a scale: 32 to 1024, a power of two; -1: a whole "
        "row. Sizes that do not divide the model's layers are left out",
    )
    schemes: tuple[Literal["asym", "sym", "sym_full", "sym_gptq"], ...] = Field(
        ("asym",), min_length=1, description="how a group's range becomes a scale (see grid.py)"
    )
    bits: int = Field(4, ge=2, le=8, description="bits of a weight; other than 4 decodes slower")
    scale_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of scales; layouts of other runtimes take float16"
    )
    ragged: bool = Field(
        False, description="where a group size does not divide a layer, its last group is shorter"
    )
    prefer: Literal["size", "latency", "accuracy"] = Field(
        "size", description="what recipes are ordered by; the first within the tolerance is kept"
    )
    metric: int4_trials.Metric = Field(
        "perplexity", description="what is kept, on the validation split's labelled tokens"
    )
    tolerance: float = Field(0.01, ge=0, description="relative loss of the metric that is accepted")
    max_trials: int = Field(100, ge=1, description="quantizations tried at most")
    high_precision: tuple[str, ...] = Field(
        (),
        description="layers, or modules above them, that stay float whatever the recipe; head, "
        "embeddings and norms always do",
    )
    max_spared: int = Field(
        8, ge=0, description="if no recipe passes: layers put on 8 bits or left float at most"
    )
    calibration: int = Field(128, ge=1, description="rows that methods calibrate on")
    calibration_length: int = Field(2048, ge=1, description="tokens of a calibration row at most")
    evaluation: int = Field(512, ge=1, description="validation rows that the metric is taken on")
    keep_zeros: bool = Field(
        True, description="weights that a sparse model has at zero stay there, in every method"
    )
    true_sequential: bool = Field(
        True,
        description="gptq: a block's layers are calibrated anew after each set that shares an "
        "input, not once per block; more exact, and a pass over the block for each set",
    )
    compute: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="precision that inputs are multiplied in on a CPU; float32 decodes slower",
    )
    exports: tuple[Layout, ...] = Field(
        (),
        description="also write the model in these layouts of other runtimes, e.g. gptq; with "
        "schemes: [sym] most of them take it, asymmetric grids are written as gptq_v2",
    )
    batch_tokens: int = Field(
        4096,
        ge=1,
        description="tokens per batch of the metric's forward passes; a speech model's are the "
        "positions of its encoder",
    )
    cpus: Annotated[float, DoesNotChangeResult] = Field(
        1.0, gt=0, description="CPU cores of a trial"
    )

    @field_validator("methods")
    @classmethod
    def _complete(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: complete_method(_METHODS, name, given) for name, given in methods.items()}

    @field_validator("group_sizes")
    @classmethod
    def _known_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        unknown = sorted(set(sizes) - set(GROUP_SIZES))
        if unknown:
            known = ", ".join(str(size) for size in GROUP_SIZES)
            raise ValueError(f"group sizes are {known}; not {', '.join(map(str, unknown))}")
        return sizes

    @field_validator("group_sizes", "schemes", "exports")
    @classmethod
    def _once_each(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(each) for each in given if given.count(each) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} given twice: name each once")
        return given

    @model_validator(mode="after")
    def _exportable(self) -> Self:
        if self.exports and self.scale_dtype != "float16":
            raise ValueError(
                f"{' and '.join(self.exports)} layouts hold scales in float16: set scale_dtype to "
                "float16, so that the exported model is the one that was measured"
            )
        if "awq" in self.exports and (self.bits != 4 or self.ragged):
            raise ValueError("the awq layout holds 4 bits and groups of one size")
        if "gptq" in self.exports and self.bits not in GPTQ_BITS:
            known = ", ".join(map(str, GPTQ_BITS))
            raise ValueError(f"the gptq layout holds {known} bits, not {self.bits}")
        ordered = self.methods.get("gptq", {})
        if "awq" in self.exports and ordered.get("act_order") and not ordered.get("static_groups"):
            raise ValueError(
                "the awq layout holds groups of neighbours: with gptq.act_order set "
                "gptq.static_groups too"
            )
        return self


@task(cpus=0, timeout="7d", version=4)
def quantize_int4(
    cfg: Int4Config, model: Artifact, tokens: Artifact, calibration: Artifact | None, out: Output
) -> None:
    """Search a recipe for a float bundle and write the bundle `int4`.

    Recipes are measured on the validation rows of `tokens`; methods calibrate on the training rows
    of `calibration` (of `tokens`, if None).
    """
    from goldcrest.kernels.weight_only.search import search

    material = _material(cfg, model, tokens, calibration, out)
    description = read_description(material.bundle)
    recipes, skipped = _recipes(cfg, material, sparse=description["sparsity"] > 0.01)
    out.progress(0.0, f"{cfg.metric} of the float model")
    (told,) = out.runtime.map(
        functools.partial(int4_trials.baseline, material=material),
        [cfg.metric], cpus=cfg.cpus, gpus=out.runtime.gpus, note="float model",
    )  # fmt: skip
    rule = _rule(cfg, told["metric"])
    trials = _Trials(cfg, material, rule, out)
    found = search(recipes, trials, rule, functools.partial(_spared, cfg, material, out))
    result = trials.results[found.chosen]
    if result["metric"] is None:
        raise StepError(
            f"none of {len(found.tried)} recipes gave a model with a finite {cfg.metric}"
            + (f"; the last one: {result['error']}" if "error" in result else ""),
            hint="look at the float model's weights and calibration inputs for NaN",
        )
    tensors = _tensors(material, found.recipe)
    int4_report.report(cfg, out, found, rule, trials.results, skipped, told)
    facts = {
        "bits": cfg.bits,
        "parameters": description["parameters"],
        "sparsity": description["sparsity"] if cfg.keep_zeros else _zeros(tensors),
        "quantization": result["description"],
        "recipe": int4_report.record(
            cfg,
            found,
            rule,
            result,
            material.rows(),
            calibrated_on="train" if calibration is None else "calibration corpus",
        ),
        "base_sha256": model.manifest["files"]["model.safetensors"]["sha256"],
        "training": {"weights": found.recipe.name},
    }
    int4_report.export(cfg, material, tensors, out)
    write_bundle(
        out,
        name="int4",
        family=material.family,
        config=load_config(material.bundle),
        tensors=tensors,
        tokenizer=tokenizer_folder(model),
        # Models that only read have none.
        generation=getattr(load_bare(material.bundle), "generation_config", None),
        facts=facts,
    )


def _zeros(tensors: Mapping[str, Tensor]) -> float:
    """Share of zeros among the weights as they are decoded, in [0, 1]: without `keep_zeros` a
    sparse model's are filled, and rounding makes others.
    """
    from goldcrest.kernels.weight_only.packing import unpack_state

    weights = unpack_state(tensors)
    packed = tuple(f"{name}." for name in weights)
    rest = {name: value for name, value in tensors.items() if not name.startswith(packed)}
    return zero_share({**rest, **{name: each.effective() for name, each in weights.items()}})


def _material(
    cfg: Int4Config, model: Artifact, tokens: Artifact, calibration: Artifact | None, out: Output
) -> Material:
    """What the trials work on, checked."""
    from goldcrest.kernels.weight_only.transformer import Options
    from goldcrest.tasks.language.collator import make_collator

    folder, description = float_text_bundle(model)
    config = load_config(folder)
    paths = {
        "train": rows_file(tokens if calibration is None else calibration, "train"),
        "validation": rows_file(tokens, "validation"),
    }
    for split, path in paths.items():
        reader = open_rows(path, description["family"])
        check_speech(reader, config)
        length = cfg.calibration_length if split == "train" else None  # of what is cut
        check_lengths(reader, description["family"], config, length)
        if len(reader) == 0:
            raise StepError(
                f"the tokens have no {split} rows, which are needed to "
                + ("calibrate on" if split == "train" else "measure the model on")
            )
    tokenizer = load_tokenizer(tokenizer_folder(model))
    return int4_trials.Material(
        bundle=folder,
        **paths,
        calibration=cfg.calibration,
        length=cfg.calibration_length,
        evaluation=cfg.evaluation,
        batch_tokens=cfg.batch_tokens,
        collate=make_collator(description["family"], tokenizer, config),
        seed=out.seed,
        options=Options(
            true_sequential=cfg.true_sequential,
            insert_scales=not cfg.exports,  # a division that other runtimes would not make
            compute=cfg.compute,
        ),
        device="cuda" if out.runtime.gpus else "cpu",
        scratch=out.scratch,
    )


def _rule(cfg: Int4Config, baseline: float) -> Rule:
    """When a trial passes; StepError for a float model that no loss is relative to."""
    from goldcrest.kernels.weight_only.search import Rule

    try:
        return Rule(
            baseline=baseline,
            higher_is_better=cfg.metric == "accuracy",
            tolerance=cfg.tolerance,
            max_trials=cfg.max_trials,
        )
    except ValueError as error:
        raise StepError(
            f"{error} ({cfg.metric} on the validation split)",
            hint="train the model further, or measure another metric",
        ) from error


def _recipes(
    cfg: Int4Config, material: Material, *, sparse: bool
) -> tuple[list[Recipe], dict[int, str]]:
    """Recipes in the order they are tried, and why group sizes were left out."""
    from goldcrest.kernels.language.architectures import bare_model
    from goldcrest.kernels.weight_only.grid import GridSettings
    from goldcrest.kernels.weight_only.search import Recipe, ordered

    bare = bare_model(load_config(material.bundle), material.family)
    spared, skipped = check_layers(cfg, bare)
    recipes = []
    for size in (each for each in cfg.group_sizes if each not in skipped):
        grids = [
            GridSettings(
                bits=cfg.bits,
                group_size=size,
                scheme=scheme,
                scale_dtype=cfg.scale_dtype,
                ragged=cfg.ragged,
            )
            for scheme in cfg.schemes
        ]
        recipes += [
            Recipe(
                method=method,
                grid=grid,
                settings=_zeros_kept(settings) if sparse and cfg.keep_zeros else settings,
                high_precision=tuple(sorted(spared)),
            )
            for grid in grids
            for method, settings in cfg.methods.items()
        ]
    return ordered(recipes, cfg.prefer), skipped


def check_layers(cfg: Int4Config, model: PreTrainedModel) -> tuple[frozenset[str], dict[int, str]]:
    """Layers that stay float, and why group sizes do not fit the model, which may lie on "meta".

    Raises InputError for a model that can't be quantized so.
    """
    from goldcrest.kernels.language.stacks import check_compressible
    from goldcrest.kernels.weight_only.grid import GridSettings
    from goldcrest.kernels.weight_only.loaders import check_loadable
    from goldcrest.kernels.weight_only.transformer import check_groups, layers_at

    try:
        check_compressible(model)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        spared = layers_at(model, cfg.high_precision)
    except ValueError as error:
        raise InputError(f"high_precision: {error}") from error
    for layout in cfg.exports:
        try:
            check_loadable(model, layout, cfg.bits, spared)
        except ValueError as error:
            raise InputError(f"exports: {error}", hint=f"leave {layout} out of exports") from error
    skipped = {}
    for size in cfg.group_sizes:
        try:
            check_groups(model, GridSettings(group_size=size, ragged=cfg.ragged), spared)
        except ValueError as error:
            skipped[size] = str(error)
    if len(skipped) == len(set(cfg.group_sizes)):
        raise InputError(
            "no group size fits this model: " + "; ".join(skipped.values()),
            hint="set group_sizes to one that fits, or ragged to true",
        )
    return spared, skipped


def _zeros_kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a sparse model; methods without the switch keep zeros anyway."""
    return {**settings, **({"keep_zeros": True} if "keep_zeros" in settings else {})}


class _Trials:
    """Runs recipes on workers, in order, and keeps the tensors of the best so far."""

    def __init__(self, cfg: Int4Config, material: Material, rule: Rule, out: Output) -> None:
        self.cfg, self.material, self.rule, self.out = cfg, material, rule, out
        self.results: list[dict[str, Any]] = []
        self._best: tuple[float, float, Recipe] | None = None

    def __call__(self, recipes: Sequence[Recipe]) -> Iterator[Trial]:
        """Trials in the order of the recipes; workers may be ahead of what is taken."""
        from goldcrest.kernels.weight_only.search import Trial

        run = functools.partial(int4_trials.trial, material=self.material, metric=self.cfg.metric)
        results = self.out.runtime.map(
            run, recipes, cpus=self.cfg.cpus, gpus=self.out.runtime.gpus, note="int4 trial"
        )
        for place, (recipe, result) in enumerate(zip(recipes, results, strict=True), 1):
            self.results.append(result)
            metric = math.nan if result["metric"] is None else result["metric"]
            self._keep_better(recipe, self.rule.loss(metric), result["bytes"])
            self.out.progress(
                place / len(recipes), f"{recipe.name}: {self.cfg.metric} {metric:.4g}"
            )
            yield Trial(metric=metric, size=result["bytes"])

    def _keep_better(self, recipe: Recipe, loss: float, size: int) -> None:
        """Delete the tensors that can't be chosen any more: 100 trials are 100 models."""
        worse: Recipe | None = recipe
        if self._best is None or (loss, size) < self._best[:2]:
            worse = None if self._best is None else self._best[2]
            self._best = (loss, size, recipe)
        if worse is not None:
            int4_trials.trial_file(self.material.scratch, worse, "safetensors").unlink(
                missing_ok=True
            )


def _spared(cfg: Int4Config, material: Material, out: Output, best: Recipe) -> list[Recipe]:
    """The best recipe with its most sensitive layers on more bits."""
    from goldcrest.kernels.weight_only.search import sparing

    if not cfg.max_spared:
        return []
    (told,) = out.runtime.map(
        functools.partial(int4_trials.sensitivities, material=material),
        [best], cpus=cfg.cpus, gpus=out.runtime.gpus, note="sensitivity of layers",
    )  # fmt: skip
    int4_report.sensitivities(out, best, told["errors"], told["weights"])
    variants = sparing(best, told["errors"], told["weights"], cfg.max_spared)
    # A checkpoint of another runtime has one number of bits.
    return [each for each in variants if not (cfg.exports and each.eight_bits)]


def _tensors(material: Material, recipe: Recipe) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(int4_trials.trial_file(material.scratch, recipe, "safetensors"))

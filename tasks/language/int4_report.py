"""What the INT4 step tells of its search, and its model in the layouts of other runtimes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import Output, StepError
from goldcrest.tasks.language.bundle import load_bare, load_config
from goldcrest.tasks.language.ranking_figure import ranked, ranking_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from goldcrest.kernels.weight_only.search import Found, Recipe, Rule
    from goldcrest.tasks.language.int4_trials import Material
    from goldcrest.tasks.language.quantize_int4 import Int4Config


def record(
    cfg: Int4Config,
    found: Found,
    rule: Rule,
    result: Mapping[str, Any],
    rows: Mapping[str, int],
    calibrated_on: str,
) -> dict[str, Any]:
    """The recipe as it is kept with the model (spec "INT4", section 3.7).

    `rows` there are to calibrate on ("train") and to measure on ("validation"), those of
    `calibrated_on` and of the task.
    """
    import torch
    import transformers

    return {
        **found.recipe.record(),
        "calibration": {
            "set": calibrated_on,
            "rows": min(cfg.calibration, rows["train"]),
            "length": cfg.calibration_length,
            "seed": result["description"]["seed"],
        },
        "metric": {
            "name": cfg.metric,
            "split": "validation",
            "rows": min(cfg.evaluation, rows["validation"]),
        },
        "baseline": rule.baseline,
        "value": result["metric"],
        "relative_loss": rule.loss(result["metric"]),
        "tolerance": rule.tolerance,
        "within_tolerance": found.passed,
        "trials": len(found.tried),
        "bytes": result["bytes"],
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def report(
    cfg: Int4Config,
    out: Output,
    found: Found,
    rule: Rule,
    results: Sequence[Mapping[str, Any]],
    skipped: Mapping[int, str],
    baseline: Mapping[str, Any],
) -> None:
    """Metrics, the table of trials, the figure, and what was measured by the clock."""
    losses = [rule.loss(trial.metric) for _, trial in found.tried]
    out.table(
        "trials",
        {
            "recipe": [recipe.name for recipe, _ in found.tried],
            cfg.metric: [result["metric"] for result in results],
            "relative_loss": [loss if math.isfinite(loss) else None for loss in losses],
            "bytes": [trial.size for _, trial in found.tried],
            "chosen": [place == found.chosen for place in range(len(losses))],
            "error": [result.get("error") for result in results],
        },
    )
    out.json(
        "trials",
        {
            "baseline": rule.baseline,
            "tolerance": rule.tolerance,
            "trials": [recipe.record() for recipe, _ in found.tried],
            "group_sizes_left_out": {str(size): why for size, why in skipped.items()},
        },
    )
    out.figure("trials", _figure(cfg, found, losses, rule.tolerance))
    chosen = results[found.chosen]
    out.metrics(
        int4={
            **{name: value for name, value in chosen["scores"].items() if value is not None},
            "float": {name: baseline[name] for name in chosen["scores"]},
            "relative_loss": losses[found.chosen],
            "within_tolerance": found.passed,
            "recipe": found.recipe.name,
            "trials": len(found.tried),
            "share_of_float32": chosen["quantized_bytes"] / chosen["quantized_float32_bytes"],
            **_decoding(baseline, chosen),
        }
    )
    clock = {name: value for name, value in baseline.items() if name.endswith("_ms")}
    out.measure(int4={**chosen["measured"], "float": clock})


def _decoding(baseline: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The loss on a few rows read as in decoding, and the perplexity's relative loss there."""
    before, after = baseline["pieced_loss"], chosen["pieced_loss"]
    if before is None or after is None:
        return {}
    relative = math.exp(min(after - before, 700.0)) - 1.0
    return {"decoding": {"loss": after, "float_loss": before, "relative_perplexity_loss": relative}}


def _figure(cfg: Int4Config, found: Found, losses: Sequence[float], tolerance: float) -> Figure:
    """Relative loss against bytes, one point a trial, one colour a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_subplot()
    for method in dict.fromkeys(recipe.method for recipe, _ in found.tried):
        points = [
            (trial.size / 1e6, 100 * loss)
            for (recipe, trial), loss in zip(found.tried, losses, strict=True)
            if recipe.method == method and math.isfinite(loss)
        ]
        if points:
            sizes, heights = zip(*points, strict=True)
            axes.scatter(sizes, heights, label=method, s=28)
    axes.axhline(100 * tolerance, linestyle="--", linewidth=1, color="grey", label="tolerance")
    axes.annotate(
        found.recipe.name,
        (found.tried[found.chosen][1].size / 1e6, 100 * losses[found.chosen]),
        textcoords="offset points",
        xytext=(6, 6),
    )
    axes.set_xlabel("model size (MB)")
    axes.set_ylabel(f"relative loss of {cfg.metric} (%)")
    axes.legend()
    return figure


def sensitivities(
    out: Output, recipe: Recipe, errors: Mapping[str, float], weights: Mapping[str, int]
) -> None:
    """The table and the figure of what each layer loses on the recipe's grid, the worst first."""
    names = ranked(errors)
    out.table(
        "sensitivities",
        {
            "layer": names,
            "relative_error": [errors[name] for name in names],
            "weights": [weights[name] for name in names],
        },
    )
    figure = ranking_figure(
        {name: 100 * error for name, error in errors.items()},
        title=f"What {recipe.grid.bits} bits harm most",
        label="error of the block's output (% of its power) when the layer alone is rounded",
    )
    out.figure("sensitivities", figure)


def export(
    cfg: Int4Config,
    material: Material,
    tensors: Mapping[str, Tensor],
    out: Output,
) -> None:
    """The model in layouts of other runtimes: a folder each, with its tokenizer."""
    from goldcrest.kernels.weight_only.checkpoint import to_checkpoint

    for layout in cfg.exports:
        try:
            exported, quantization = to_checkpoint(tensors, layout, load_bare(material.bundle))
        except ValueError as error:
            raise StepError(
                f"the {layout} layout cannot hold the model that was found: {error}",
                hint=f"leave {layout} out of exports, or restrict the recipes",
            ) from error
        out.tensors(f"{layout}/model", exported)
        out.json(f"{layout}/quantize_config", quantization)
        values = load_config(material.bundle).to_dict()
        plain = {name: value for name, value in values.items() if not name.startswith("_")}
        out.json(f"{layout}/config", {**plain, "quantization_config": quantization})
        _further_files(material.bundle, layout, out)


def _further_files(bundle: Path, layout: str, out: Output) -> None:
    """What another runtime reads beside weights: the tokenizer, and how to write after a prompt."""
    for source in sorted(each for each in (bundle / "tokenizer").iterdir() if each.is_file()):
        shutil.copyfile(source, out.file(f"{layout}/{source.name}"))
    generation = bundle / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out.file(f"{layout}/{generation.name}"))

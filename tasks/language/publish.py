"""Publish: a language bundle that serves, with what the evaluation learnt about it.

The step that makes a model writes its weights before anybody knows how good it is. This one copies
them and writes the card with the measured figures: those that are the same in every run. Seconds
and megabytes differ between runs and stay in the manifest of the evaluation.

Artifact: the bundle's files; `measured` in bundle.json holds
    <metric>, <metric>_ci    and the rows and examples they were computed on
    bytes                    of what serving needs
and `bos` says whether prompts begin with the tokenizer's bos (see prompts.py).
"""

from __future__ import annotations

import shutil
from typing import Any

from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.language.bundle import model_card, read_description, verified

MEMBERS = ("config.json", "generation_config.json", "model.safetensors")


class PublishTextConfig(Config):
    """What people should know of the bundle beside what was measured."""

    name: str | None = Field(
        None, description="what the evaluation calls the model; None: the bundle's own name"
    )
    licence: str | None = Field(
        None, description="terms of the bundle, for its card; None: what the bundle says itself"
    )


@task(cpus=0.1, seeded=False, timeout="30m")
def publish_text(
    cfg: PublishTextConfig, model: Artifact, evaluation: Artifact, out: Output
) -> None:
    """Copy the bundle `model` and complete it with what `evaluation` says of it."""
    description = read_description(verified(model))
    description["measured"] = _measured(evaluation, cfg.name or description["name"])
    description |= evaluation.json("prompts")  # it is prompted as it was trained and measured
    for member in model.manifest["files"]:
        if member in MEMBERS or member.startswith("tokenizer/"):
            shutil.copyfile(model.file(member), out.file(member))
    if cfg.licence is not None:
        description["licence"] = cfg.licence
    out.json("bundle", description)
    out.text("MODEL_CARD.md", model_card(description))


def _measured(evaluation: Artifact, name: str) -> dict[str, Any]:
    """Quality and size of the model of that name."""
    models = evaluation.metrics.get("models", {})
    if name not in models:
        raise StepError(
            f"the evaluation knows no model '{name}'; it has: {', '.join(sorted(models))}",
            hint="evaluate every bundle under its own name",
        )
    quality = evaluation.metrics.get("language", {}).get(name, {})
    return {**quality, "bytes": models[name]["bytes"]}

"""Publish: a bundle that serves, with what the evaluation learnt about it.

The network's step writes weights before anybody knows how good they are. This one copies them,
adds the thresholds of its scores, and writes the card with the measured error rates.

Artifact: the bundle's files, calibration.json where labelled speakers were left to evaluate on:
    system, score ("cosine"), eer (%), trials
    thresholds    eer, far_0.1, far_0.05, far_0.01: accept at this score or above
    histogram     edges (51), target (50) and nontarget (50) counts
"""

from __future__ import annotations

import shutil
from typing import Any

from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, task
from goldcrest.tasks.speaker.bundle import LICENCE, model_card, read_description

MEMBERS = ("model.safetensors", "head.safetensors")


class PublishConfig(Config):
    """What people should know of the bundle beside what was measured."""

    licence: str = Field(LICENCE, description="terms of the bundle, for its card")


@task(cpus=0.1, seeded=False, timeout="30m")
def publish(cfg: PublishConfig, model: Artifact, evaluation: Artifact, out: Output) -> None:
    """Copy the bundle `model` and complete it with what `evaluation` says of it."""
    model.file("bundle.json")
    description = read_description(model.path)
    for member in MEMBERS:
        if member in model:
            shutil.copyfile(model.file(member), out.file(member))
    name = description["name"]
    description["licence"] = cfg.licence
    if "calibration_verification.json" in evaluation:
        known = evaluation.json("calibration_verification")[name]
        out.json("calibration", {"system": name, **known})
    measured = _measured(evaluation, name)
    if measured:
        description["measured"] = measured
    out.json("bundle", description)
    out.text("MODEL_CARD.md", model_card(description))


def _measured(evaluation: Artifact, name: str) -> dict[str, Any]:
    """Error rates of the bundle on speakers that no step trained on, and its size."""
    found = evaluation.metrics.get("verification", {}).get(name, {})
    rates = {key: found[key] for key in ("eer", "eer_ci", "eer_cosine", "trials") if key in found}
    size = evaluation.metrics.get("models", {}).get(name, {}).get("bytes")
    return rates | ({"bytes": size} if size is not None else {})

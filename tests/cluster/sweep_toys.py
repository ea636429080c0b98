"""A small pipeline to sweep over: a costly prefix, a step with a curve, a measurement.

Every execution of a step leaves a file in `marks`, so tests can count what really ran.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    Output,
    StepError,
    TrainingConfig,
    task,
)


class PrefixConfig(Config):
    """The part that trials share."""

    speakers: int = Field(3, ge=1, description="how many")
    seconds: Annotated[float, DoesNotChangeResult] = Field(0.0, description="how long it takes")
    marks: Annotated[str, DoesNotChangeResult] = Field("", description="folder of the marks")


class LearnConfig(Config):
    """The part that is swept."""

    rate: float = Field(0.1, gt=0, le=10, description="best at 0.3")
    depth: int = Field(2, ge=1, description="best at 2")
    kind: str | dict | None = Field("plain", description="plain, or anything else, which is worse")
    epochs: int = Field(4, ge=1, description="rows of the curve")
    fail_above: float = Field(100.0, description="a rate above it fails")
    seconds: Annotated[float, DoesNotChangeResult] = Field(0.0, description="per epoch")
    marks: Annotated[str, DoesNotChangeResult] = Field("", description="folder of the marks")
    training: TrainingConfig = Field(TrainingConfig(epochs=1), description="marks it as training")


class Config(Config):  # type: ignore[no-redef]
    """The whole."""

    prefix: PrefixConfig = PrefixConfig()
    learn: LearnConfig = LearnConfig()
    hub_token: str = Field("", description="a secret that no step needs")


def _mark(folder: str, step: str) -> None:
    if folder:
        (Path(folder) / f"{step}-{os.getpid()}-{secrets.token_hex(3)}").touch()


@task(cpus=2)
def prefix(cfg: PrefixConfig, out: Output) -> None:
    """Takes its time and both cores."""
    _mark(cfg.marks, "prefix")
    time.sleep(cfg.seconds)
    out.json("number", cfg.speakers)


@task(cpus=1)
def second(cfg: PrefixConfig, number: Artifact, out: Output) -> None:
    """Another shared step."""
    _mark(cfg.marks, "second")
    out.json("number", number.json("number") + 1)


@task(cpus=1)
def learn(cfg: LearnConfig, number: Artifact, out: Output) -> None:
    """A curve that falls towards the error that it is about."""
    _mark(cfg.marks, "learn")
    if cfg.rate > cfg.fail_above:
        raise StepError("the rate is too high", hint="lower it")
    error = (cfg.rate - 0.3) ** 2 + abs(cfg.depth - 2) + (0 if cfg.kind == "plain" else 0.5)
    for epoch in range(cfg.epochs):
        time.sleep(cfg.seconds)
        out.log(epoch=float(epoch), loss=error + 1.0 / (1 + epoch))
    out.json("error", error)


@task(cpus=1)
def measure(cfg: PrefixConfig, learnt: Artifact, out: Output) -> None:
    """The metric."""
    _mark(cfg.marks, "measure")
    out.metrics(verification={"dense": {"eer": learnt.json("error"), "note": "text"}})


def build(cfg: Config):
    """prefix -> second -> learn -> measure."""
    first = prefix.bind(cfg.prefix)
    shared = second.bind(cfg.prefix, first)
    return measure.bind(cfg.prefix, learn.bind(cfg.learn, shared))

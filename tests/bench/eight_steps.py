"""A pipeline of eight steps that do next to nothing: what is left is the engine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from goldcrest.cluster import api


class StepConfig(api.Config):
    """A number to write down."""

    value: int = Field(0, description="the number")


@api.task(cpus=1)
def start(cfg: StepConfig, out: api.Output) -> None:
    """Write the number down."""
    out.json("number", cfg.value)


@api.task(cpus=1)
def follow(cfg: StepConfig, before: api.Artifact, out: api.Output) -> None:
    """Add the number to the one before."""
    out.json("number", before.json("number") + cfg.value)


class Config(api.Config):
    """One number for all steps."""

    step: StepConfig = Field(StepConfig(), description="the number of every step")


def build(cfg: Config) -> Any:
    """A chain of eight."""
    node = start.bind(cfg.step, name="step-0")
    for number in range(1, 8):
        node = follow.bind(cfg.step, node, name=f"step-{number}")
    return node

"""A pipeline of one step that trains a toy with the engine: to sweep over its learning rate."""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from goldcrest.cluster.api import Config, Output, TrainingConfig, task
from tests.cluster.training_toys import NoNoise


class LearnConfig(Config):
    """How the toy is trained."""

    seconds: float = Field(0.0, ge=0, description="how long an epoch takes")
    training: TrainingConfig = TrainingConfig(epochs=20, batch_size=12)


class Config(Config):  # type: ignore[no-redef]
    """The whole."""

    learn: LearnConfig = LearnConfig()


class Slow(NoNoise):
    """The toy with epochs that are long enough to be stopped between two of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def evaluate(self, model: Any, *, epoch: int) -> dict[str, float]:
        """The toy's accuracy, later."""
        time.sleep(self.seconds)
        return super().evaluate(model, epoch=epoch)


@task(cpus=0)
def learn(cfg: LearnConfig, out: Output) -> None:
    """Train, and tell the first and the last row of the engine's history."""
    trained = out.runtime.train(Slow(cfg.seconds), cfg.training, out)
    first, last = trained.history[0], trained.history[-1]
    out.metrics(training={"first": first["loss"], "loss": last["loss"]})
    out.json("epochs", len(trained.history))


def build(cfg: Config):
    """The one step."""
    return learn.bind(cfg.learn)

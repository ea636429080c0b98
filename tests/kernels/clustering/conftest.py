"""A small training loop that plays the engine's part for the clustering objectives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


class Loop:
    """SGD or Adam over an objective; `stop_after` and `resume` cut a run in two."""

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        decay: float = 0.996,
        adam: bool = False,
        seed: int = 0,
    ) -> None:
        self.epochs, self.batch_size, self.decay, self.seed = epochs, batch_size, decay, seed
        self.learning_rate, self.adam = learning_rate, adam

    def __call__(
        self, objective: Any, *, stop_after: int | None = None, resume: Any = None
    ) -> SimpleNamespace:
        torch.manual_seed(self.seed)
        model = objective.build_model()
        groups = objective.parameter_groups(model)
        if self.adam:
            optimizer: Any = torch.optim.Adam(groups, lr=self.learning_rate)
        else:
            optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9)
        first, history = 0, []
        if resume is not None:
            model.load_state_dict(resume.model_state)
            optimizer.load_state_dict(resume.optimizer_state)
            objective.load_state_dict(resume.extra_state)
            first, history = resume.epochs, list(resume.history)
        last = self.epochs if stop_after is None else stop_after
        for epoch in range(first, last):
            rng = np.random.default_rng((self.seed, epoch))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.decay**epoch
            history.append(self._epoch(objective, model, optimizer, rng, epoch))
        return SimpleNamespace(
            model_state={name: value.clone() for name, value in model.state_dict().items()},
            optimizer_state=optimizer.state_dict(),
            extra_state={k: v.clone() for k, v in objective.state_dict().items()},
            history=history,
            epochs=last,
        )

    def _epoch(
        self, objective: Any, model: Any, optimizer: Any, rng: np.random.Generator, epoch: int
    ) -> dict[str, float]:
        model.train()
        order = rng.permutation(len(objective))
        row: dict[str, float] = {"epoch": epoch}
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            batch = objective.batch(order[start : start + self.batch_size], rng)
            losses = objective.losses(model, batch, epoch=epoch)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            objective.after_step(model, nullcontext)
            row |= {name: value.item() for name, value in losses.items()}
        model.eval()
        return row | objective.evaluate(model, epoch=epoch)


@pytest.fixture
def loop() -> Callable[..., Loop]:
    """Makes a `Loop`."""
    torch.set_num_threads(1)
    return Loop

"""What every clustering method takes and gives back.

N utterances, D dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class TrainedLike(Protocol):
    """What a training engine hands back, as far as a clusterer needs it."""

    @property
    def model_state(self) -> dict[str, Tensor]:
        """Weights and buffers by name."""
        ...

    @property
    def extra_state(self) -> dict[str, Tensor]:
        """The objective's own state after the last epoch."""
        ...

    @property
    def history(self) -> list[dict[str, float]]:
        """One row of numbers per epoch."""
        ...


TRACED = 20_000
"""Most rows whose clusters are kept of every epoch: 8 MB in a hundred."""

Train = Callable[[Any], TrainedLike]
"""Trains an objective (model, batches, losses) and returns its weights and history."""


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The result of `fit`.

    `labels` (N,) int64 in [0, C), `history` one row of numbers per iteration or epoch, `model` the
    tensors that the method's `predict(model, x)` needs to label further vectors. A method that is
    trained also gives `trace` (epochs, S) int32: the clusters of the rows `traced_rows(N)` after
    every epoch, so that who knows the truth can look at it afterwards and is not in the training.
    """

    labels: np.ndarray
    history: list[dict[str, float]]
    model: Mapping[str, Tensor] = field(default_factory=dict)
    trace: np.ndarray | None = None


def traced_rows(count: int) -> np.ndarray:
    """Rows (S,) int64 of `count` vectors whose clusters are traced: all, or 20,000 evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, TRACED)).round().astype(np.int64))


def check_input(x: Tensor, clusters: int) -> None:
    """Refuse input that no method can cluster, with a ValueError that says why.

    `x` must be a finite (N, D) matrix with at least `clusters` rows, `clusters` at least 1.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"vectors must be a matrix (N, D), got the shape {tuple(x.shape)}")
    if clusters < 1:
        raise ValueError(f"the number of clusters must be at least 1, got {clusters}")
    if x.shape[0] < clusters:
        raise ValueError(
            f"{x.shape[0]} vectors cannot make {clusters} clusters; ask for fewer clusters"
        )
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(dim=1).sum())
        raise ValueError(f"{bad} of {x.shape[0]} vectors hold NaN or infinite values")

"""Cluster: vectors of the training utterances -> a pseudo-label each.

The method is a file of kernels/clustering. The number of clusters, and what else the method needs
to know of the data, is chosen without labels where the config says "auto". Where the corpus has
speaker labels they are used to *measure* the clustering, and for nothing else.

Artifact:
    labels     id, label (0..K-1, without gaps)
    model      the tensors that label further vectors
    history    one row per epoch or iteration, and the figure of it
    agreement  NMI, AMI and ACC after every epoch, and the figure of them, where speakers are known
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import Artifact, Config, Output, StepError, TrainingConfig, task
from goldcrest.tasks.history import history_figure
from goldcrest.tasks.methods import complete_method, settings_of
from goldcrest.tasks.speaker.labels import (
    clustering_facts,
    compact,
    speaker_truth,
    write_labels,
)
from goldcrest.tasks.speaker.training import check_batches, fitting
from goldcrest.tasks.speaker.vectors import Vectors, read_vectors

if TYPE_CHECKING:
    from goldcrest.kernels.clustering.result import Clustering

FAMILY = "goldcrest.kernels.clustering"


class ClusterConfig(Config):
    """Which method clusters the training vectors, into how many clusters."""

    method: str = Field("cimc", description="a file of kernels/clustering")
    settings: dict[str, Any] = Field({}, description="the method's settings (see its file)")
    label: str = Field("", description="name in the metrics; empty: the method's name")
    clusters: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto", description="number of clusters; auto: chosen without labels by choose_clusters"
    )
    training: TrainingConfig = Field(
        TrainingConfig(
            epochs=150,
            batch_size=10_240,
            optimizer="sgd",
            learning_rate=0.01,
            momentum=0.9,
            schedule="exponential",
            decay=0.996,
        ),
        description="the training engine, for methods that are trained by gradients",
    )

    @field_validator("training")
    @classmethod
    def _batches_normalise(cls, training: TrainingConfig) -> TrainingConfig:
        check_batches(training)
        return training

    @model_validator(mode="after")
    def _complete(self) -> Self:
        completed = complete_method(FAMILY, self.method, self.settings)
        object.__setattr__(self, "settings", completed)  # the model is frozen, this is its birth
        return self


@task(cpus=0, timeout="24h")
def cluster(
    cfg: ClusterConfig,
    vectors: Artifact,
    count: Artifact | None,
    corpus: Artifact | None,
    out: Output,
) -> None:
    """Cluster the training vectors; `corpus` adds metrics where it knows the speakers.

    `count` is the result of choose_clusters, needed where `cfg.clusters` is "auto".
    """
    found = read_vectors(vectors, "train")
    clusters = _number_of_clusters(cfg, count)
    if clusters > len(found.ids):
        raise StepError(
            f"{len(found.ids)} training utterances cannot make {clusters} clusters",
            hint="lower clustering.clusters, or give more speech",
        )
    result = _fit(cfg, found, clusters, out)
    labels = compact(result.labels)
    write_labels(out, found.ids, labels)
    out.tensors("model", dict(result.model))
    out.json("history", result.history)
    facts = clustering_facts(found, labels, clusters, corpus)
    out.metrics(clustering={cfg.label or cfg.method: facts})
    if len(result.history) > 1:
        out.figure("history", history_figure(result.history))
    rows = agreement(result.trace, found.ids, corpus)
    if len(rows) > 1:
        out.json("agreement", rows)
        out.figure("agreement", history_figure(rows))


def agreement(
    trace: np.ndarray | None, ids: list[str], corpus: Artifact | None
) -> list[dict[str, float]]:
    """NMI, AMI and ACC of every epoch's labels with the speakers, for the figure alone.

    Computed after the training from the labels that it kept: no step that trains sees a speaker.
    """
    from goldcrest.kernels.clustering.result import traced_rows
    from goldcrest.kernels.metrics.clustering import supervised_metrics

    truth = speaker_truth(ids, corpus)
    if trace is None or truth is None:
        return []
    known, speakers = truth
    numbers = np.full(len(ids), -1)
    numbers[known] = speakers
    wanted = numbers[traced_rows(len(ids))]
    rows = []
    for epoch, labels in enumerate(trace):
        found = supervised_metrics(labels[wanted >= 0], wanted[wanted >= 0])
        rows.append({"epoch": epoch, **{name: found[name] for name in ("nmi", "ami", "acc")}})
    return rows


def _fit(cfg: ClusterConfig, found: Vectors, clusters: int, out: Output) -> Clustering:
    """The method's result: trained by the engine, or computed by one worker with a core."""
    from goldcrest.kernels import clustering

    fit = functools.partial(
        _fit_method, cfg=cfg, clusters=clusters, seed=out.seed, augmented=_tensor(found.augmented)
    )
    if not getattr(clustering.load(cfg.method), "TRAINED", False):
        (result,) = out.runtime.map(fit, [found.matrix], note=f"cluster by {cfg.method}")
        return result
    training = fitting(cfg.training, len(found.ids))
    return fit(found.matrix, train=lambda objective: out.runtime.train(objective, training, out))


def _fit_method(
    matrix: np.ndarray,
    *,
    cfg: ClusterConfig,
    clusters: int,
    seed: int,
    augmented: Any,
    train: Callable[[Any], Any] | None = None,
) -> Clustering:
    from goldcrest.kernels import clustering

    fitted: Clustering = clustering.load(cfg.method).fit(
        _tensor(matrix),
        clusters,
        settings_of(f"{FAMILY}.{cfg.method}", "Settings", cfg.settings),
        seed=seed,
        train=train,
        augmented=augmented if len(augmented) else None,
    )
    return fitted


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _number_of_clusters(cfg: ClusterConfig, count: Artifact | None) -> int:
    if cfg.clusters != "auto":
        return cfg.clusters
    if count is None:
        raise StepError("the number of clusters is 'auto', but nothing has chosen it")
    return int(count.json("clusters")["clusters"])

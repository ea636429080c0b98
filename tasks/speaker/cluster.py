"""Cluster: vectors of the training utterances -> a pseudo-label each.

The method is a file of kernels/clustering. The number of clusters, and what else the method needs
to know of the data, is chosen without labels where the config says "auto". Where the corpus has
speaker labels they are used to *measure* the clustering, and for nothing else.

Artifact:
    labels     id, label (0..K-1, without gaps)
    model      the tensors that label further vectors
    history    one row per epoch or iteration, and the figure of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from goldcrest.cluster.api import Artifact, Config, Output, StepError, TrainingConfig, task
from goldcrest.tasks.methods import complete_method, settings_of
from goldcrest.tasks.speaker.training import fitting, history_figure
from goldcrest.tasks.speaker.vectors import Vectors, facts_by_id, read_vectors

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
    candidates: tuple[dict[str, Any], ...] = Field(
        (),
        description="changes of the settings to try (such as {mu: 1.5}); the labels that agree "
        "best with one another and with AHC's are taken, by AMI, without any truth",
    )
    candidate_seeds: int = Field(1, ge=1, description="runs per candidate, each with its own seed")
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

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for change in self.candidates:
            complete_method(FAMILY, self.method, {**self.settings, **change})
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
    x = _tensor(found.matrix)
    clusters = _number_of_clusters(cfg, count)
    if clusters > len(found.ids):
        raise StepError(
            f"{len(found.ids)} training utterances cannot make {clusters} clusters",
            hint="lower clustering.clusters, or give more speech",
        )
    result = _fit_best(cfg, x, clusters, found, out)
    labels = compact(result.labels)
    out.table("labels", {"id": found.ids, "label": pa.array(labels, pa.int32())})
    out.tensors("model", dict(result.model))
    out.json("history", result.history)
    _measure(cfg.label or cfg.method, found, labels, clusters, corpus, out)
    if len(result.history) > 1:
        out.figure("history", history_figure(result.history))


def _fit_best(cfg: ClusterConfig, x: Any, clusters: int, found: Vectors, out: Output) -> Clustering:
    """The method's result, of several candidates the one that the others agree with most."""
    changes = cfg.candidates or ({},)
    results = {
        (number, seed): _fit(
            {**cfg.settings, **change},
            cfg,
            x,
            clusters,
            found,
            out.part(f"candidate-{number}-{seed}", out.seed + seed),
        )
        for number, change in enumerate(changes)
        for seed in range(cfg.candidate_seeds)
    }
    if len(results) == 1:
        return next(iter(results.values()))
    from goldcrest.kernels.clustering import ahc
    from goldcrest.kernels.clustering.selection import by_agreement
    from goldcrest.kernels.metrics.clustering import adjusted_mutual_information

    reference = ahc.fit(x, clusters, ahc.Settings(), seed=out.seed).labels
    seeds = range(cfg.candidate_seeds)
    chosen, scores = by_agreement(
        {n: [results[n, seed].labels for seed in seeds] for n in range(len(changes))}, reference
    )
    agreement = {
        seed: adjusted_mutual_information(results[chosen, seed].labels, reference) for seed in seeds
    }
    best = max(seeds, key=lambda seed: agreement[seed])
    out.json(
        "selection",
        [
            {"change": change, "agreement": scores[number], "chosen": number == chosen}
            for number, change in enumerate(changes)
        ],
    )
    out.metrics(
        choice={
            "candidate": chosen,
            "agreement": scores[chosen],
            **{name: value for name, value in changes[chosen].items() if name == "mu"},
        }
    )
    return results[chosen, best]


def _fit(
    settings: dict[str, Any],
    cfg: ClusterConfig,
    x: Any,
    clusters: int,
    found: Vectors,
    out: Output,
) -> Clustering:
    from goldcrest.kernels import clustering

    training = fitting(cfg.training, len(found.ids))
    fitted: Clustering = clustering.load(cfg.method).fit(
        x,
        clusters,
        settings_of(f"{FAMILY}.{cfg.method}", "Settings", settings),
        seed=out.seed,
        train=lambda objective: out.runtime.train(objective, training, out),
        augmented=_tensor(found.augmented) if len(found.augmented) else None,
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


def compact(labels: np.ndarray) -> np.ndarray:
    """Labels without gaps: (N,) int -> (N,) int32 in 0..K-1, order of the values kept."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def _measure(
    name: str,
    found: Vectors,
    labels: np.ndarray,
    clusters: int,
    corpus: Artifact | None,
    out: Output,
) -> None:
    from goldcrest.kernels.metrics.clustering import clustering_metrics, supervised_metrics

    sizes = np.bincount(labels)
    facts: dict[str, Any] = {
        "clusters_asked": clusters,
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        **clustering_metrics(labels, x=found.matrix),
    }
    if corpus is not None:
        speaker_of = facts_by_id(corpus, "speaker")
        known = np.array([speaker_of.get(name) is not None for name in found.ids])
        if known.any():
            names = [str(speaker_of[n]) for n, k in zip(found.ids, known, strict=True) if k]
            truth = np.unique(names, return_inverse=True)[1]
            facts |= supervised_metrics(labels[known], truth)
            facts["speakers"] = int(truth.max()) + 1
    out.metrics(clustering={name: facts})

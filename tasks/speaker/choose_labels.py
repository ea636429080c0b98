"""Choose labels: of several clusterings of the same vectors, the one to train on, without truth.

Settings such as CIMC's mu cannot be chosen by a loss: other settings, other losses. What is asked
is which partition another method finds too (kernels/clustering/selection.py): of every candidate
the agreement (AMI) with the reference's labels and with its own other seeds.
Where the corpus knows its speakers, the figure shows the criterion beside the truth it never saw.

Artifact: labels, history (and its figure) and model of the chosen clustering; selection.json.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, task
from goldcrest.tasks.history import history_figure
from goldcrest.tasks.speaker.cluster import ClusterConfig
from goldcrest.tasks.speaker.labels import clustering_facts, speaker_truth, write_labels
from goldcrest.tasks.speaker.vectors import read_vectors


class CandidatesConfig(Config):
    """What is tried beside the clustering's own settings."""

    changes: tuple[dict[str, Any], ...] = Field(
        ({},), min_length=1, description="changes of the settings, such as {mu: 1.3}; {}: as given"
    )
    seeds: int = Field(1, ge=1, description="runs per change, each with its own seed")
    reference: ClusterConfig = Field(
        ClusterConfig(method="ahc"),
        description="another method, that errs differently; "
        "its number of clusters is the clustering's",
    )

    def runs(self, base: ClusterConfig) -> dict[str, tuple[ClusterConfig, int]]:
        """`{name: (config, addition to the seed)}` of every run; names are `CHANGE_SEED`."""
        name = base.label or base.method
        return {
            f"{number}_{seed}": (
                ClusterConfig.model_validate(
                    base.model_dump()
                    | {
                        "settings": {**base.settings, **change},
                        "label": f"{name}-{number}" + (f"-{seed}" if self.seeds > 1 else ""),
                    }
                ),
                seed,
            )
            for (number, change), seed in itertools.product(
                enumerate(self.changes), range(self.seeds)
            )
        }


class ChooseLabelsConfig(Config):
    """How the chosen clustering is called, and what was tried."""

    label: str = Field(description="name of the chosen clustering in the metrics")
    candidates: CandidatesConfig = Field(CandidatesConfig(), description="what was tried")


@task(cpus=1, seeded=False, timeout="2h")
def choose_labels(
    cfg: ChooseLabelsConfig,
    vectors: Artifact,
    reference: Artifact,
    corpus: Artifact | None,
    out: Output,
    **tried: Artifact,
) -> None:
    """Keep the clustering that agrees best; `tried` are named by `CandidatesConfig.runs`."""
    from goldcrest.kernels.clustering.selection import by_agreement

    found = read_vectors(vectors, "train")
    labels = {name: labels_of(artifact, found.ids) for name, artifact in tried.items()}
    numbers = range(len(cfg.candidates.changes))
    partitions = {
        number: {seed: labels[f"{number}_{seed}"] for seed in range(cfg.candidates.seeds)}
        for number in numbers
    }
    other = labels_of(reference, found.ids)
    chosen, scores = by_agreement({n: list(partitions[n].values()) for n in numbers}, other)
    seed, _ = by_agreement({s: [labels[f"{chosen}_{s}"]] for s in partitions[chosen]}, other)
    best = tried[f"{chosen}_{seed}"]
    _keep(cfg, best, out)
    truth = speaker_truth(found.ids, corpus)
    rows = [
        {
            "change": cfg.candidates.changes[number],
            "agreement": scores[number],
            "chosen": number == chosen,
            **_true_agreement(list(partitions[number].values()), truth),
        }
        for number in numbers
    ]
    out.json("selection", rows)
    out.metrics(
        clustering={
            cfg.label: clustering_facts(found, labels[f"{chosen}_{seed}"], _asked(best), corpus)
        },
        choice={"candidate": chosen, "agreement": scores[chosen]},
    )
    if truth is not None and len(rows) > 1:
        out.figure("selection", selection_figure(rows))


def labels_of(artifact: Artifact, ids: list[str]) -> np.ndarray:
    """The artifact's labels (N,) int32 in the order of `ids`."""
    table = artifact.table("labels")
    pairs = zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
    label = dict(pairs)
    return np.array([label[name] for name in ids], np.int32)


def _keep(cfg: ChooseLabelsConfig, best: Artifact, out: Output) -> None:
    table = best.table("labels")
    write_labels(out, table["id"].to_pylist(), table["label"].to_numpy())
    out.tensors("model", best.tensors("model"))
    history = best.json("history")
    out.json("history", history)
    if len(history) > 1:
        out.figure("history", history_figure(history))
    if "agreement.json" in best:
        agreement = best.json("agreement")
        out.json("agreement", agreement)
        out.figure("agreement", history_figure(agreement))


def _asked(artifact: Artifact) -> int:
    (facts,) = artifact.metrics["clustering"].values()
    return int(facts["clusters_asked"])


def _true_agreement(
    labellings: list[np.ndarray], truth: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, float]:
    """Mean AMI with the speakers, only to show how good the criterion is."""
    from goldcrest.kernels.metrics.clustering import adjusted_mutual_information

    if truth is None:
        return {}
    known, speakers = truth
    found = [adjusted_mutual_information(labels[known], speakers) for labels in labellings]
    return {"ami": float(np.mean(found))}


def selection_figure(rows: list[dict[str, Any]]) -> Any:
    """The label-free agreement of every candidate against its AMI with the true speakers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6))
    axes = figure.subplots()
    for row in rows:
        name = ", ".join(f"{k}={v}" for k, v in row["change"].items()) or "as given"
        colour = "tab:red" if row["chosen"] else "tab:blue"
        axes.plot(row["agreement"], row["ami"], "o", color=colour)
        axes.annotate(name, (row["agreement"], row["ami"]), fontsize="x-small")
    axes.set(
        xlabel="agreement with the reference (AMI, no labels)",
        ylabel="AMI with the speakers",
        title="candidates; red is the one chosen",
    )
    figure.tight_layout()
    return figure

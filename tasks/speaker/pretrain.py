"""Pretrain: an ECAPA-TDNN on labels of the training utterances, pseudo or true.

The step sees features and a table of labels; the speakers of the corpus are in neither.

Artifact: the bundle `dense` (see bundle.py) with head.safetensors, history and its figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from goldcrest.cluster.api import Artifact, Output, StepError, TrainingConfig, task
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.history import history_figure
from goldcrest.tasks.speaker.bundle import write_bundle
from goldcrest.tasks.speaker.network import LossConfig, NetworkSettings, network_settings
from goldcrest.tasks.speaker.training import check_batches, fitting


class PretrainConfig(LossConfig):
    """Network, loss and training of the dense model (speaker study, table 10.1)."""

    labels: bool = Field(
        False, description="train on the corpus's own speakers: the supervised upper bound"
    )
    min_cluster: int = Field(
        2, ge=1, description="labels with fewer utterances are left out: nothing to contrast"
    )
    network: NetworkSettings = Field({}, description="ECAPA-TDNN: channels, bottlenecks, sizes")
    training: TrainingConfig = Field(
        TrainingConfig(
            epochs=80,
            batch_size=200,
            optimizer="adam",
            learning_rate=1e-3,
            schedule="exponential",
            decay=0.97,
            weight_decay=2e-5,
        ),
        description="the training engine",
    )

    @field_validator("training")
    @classmethod
    def _batches_normalise(cls, training: TrainingConfig) -> TrainingConfig:
        check_batches(training)
        return training


@task(cpus=0, timeout="7d")
def pretrain(cfg: PretrainConfig, features: Artifact, labels: Artifact, out: Output) -> None:
    """Train the network on labelled training utterances and write the bundle `dense`."""
    from goldcrest.tasks.speaker.objective import SpeakerObjective

    examples = read_examples(features, labels, cfg.min_cluster)
    network = {**cfg.network, "input_dim": examples.reader.dimensions}
    objective = SpeakerObjective(
        examples, network=network_settings(network), **cfg.objective_settings()
    )
    training = fitting(cfg.training, len(objective))
    trained = out.runtime.train(objective, training, out)
    body, head = split_state(trained.model_state)
    out.tensors("head", head)
    out.json("history", trained.history)
    out.figure("history", history_figure(trained.history))
    out.measure(training={"dense": trained.measurements})
    write_bundle(
        out,
        name="dense",
        tensors=body,
        network=network,
        front_end=features.json("frontend"),
        facts={
            "classes": examples.classes,
            "training": {
                "labels": "true" if cfg.labels else "pseudo",
                "utterances": len(objective) // examples.speeds,
                "classes": examples.classes // examples.speeds,
                "speeds of each": examples.speeds,
                "epochs": training.epochs,
                "loss": cfg.margin,
            },
        },
    )


def read_examples(features: Artifact, labels: Artifact, min_cluster: int) -> Any:
    """The labelled utterances whose label is frequent enough, labels without gaps.

    What the features hold at other speeds follows, with labels of its own.
    """
    from goldcrest.tasks.speaker.objective import Examples

    table = labels.table("labels")
    ids = np.array(table.column("id").to_pylist())
    label = table.column("label").to_numpy()
    frequent = np.bincount(label)[label] >= min_cluster
    if len(np.unique(label[frequent])) < 2:
        raise StepError(
            f"fewer than two labels have {min_cluster} utterances or more: nothing to tell apart",
            hint="give more speech, or lower the number of clusters",
        )
    compacted = np.unique(label[frequent], return_inverse=True)[1]
    reader = FrameReader(features.file("fbank.arrow"))
    examples = Examples.of(reader, ids[frequent].tolist(), compacted)
    if "speeds.arrow" in features:
        examples = examples.with_speeds(FrameReader(features.file("speeds.arrow")))
    return examples


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A SpeakerClassifier's state as the network's and the head's."""
    body = {n.removeprefix("network."): v for n, v in state.items() if n.startswith("network.")}
    head = {n.removeprefix("head."): v for n, v in state.items() if n.startswith("head.")}
    return body, head


def join_state(body: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    joined = {f"network.{name}": value for name, value in body.items()}
    return joined | {f"head.{name}": value for name, value in head.items()}

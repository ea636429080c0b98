"""What a step asks of the nodes: for its own process, and for the work that it hands out.

A task that declares `cpus=0` only hands out work and waits. It holds nothing but its place in the
pool that its labels name; all that a profile gives it (cores, GPUs, memory, accelerator type,
custom resources, labels) is meant for its workers, each of them. So a step that trains can never
hold the one GPU that its training needs. None of this enters a key.

What a step hands to its workers are paths: of its inputs, of its scratch. With a store in a bucket
these are paths of its own node's cache, so there its workers stay on that node (`on_node`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from goldcrest.cluster.api import Config, Resources, TrainingConfig
from goldcrest.cluster.dag import Step

NODE_ID = "ray.io/node-id"  # the label that Ray itself gives to every node


def own_resources(step: Step) -> Resources:
    """What the step's own process holds while it runs."""
    if not hands_out(step):
        return step.resources
    return Resources(cpus=0.0, labels=step.resources.labels)


def worker_resources(step: Step) -> Resources:
    """What each worker of the step asks for beside what the call itself does; cpus 0: nothing."""
    if hands_out(step):
        return step.resources
    return Resources(cpus=0.0, labels=step.resources.labels)


def hands_out(step: Step) -> bool:
    """Whether the task declares that it only hands out work."""
    return step.task.resources.cpus == 0


def for_call(workers: Resources, *, cpus: float, gpus: float) -> Resources:
    """What one worker of a fan-out asks for, that wants `cpus` and `gpus` by itself.

    More cores where the profile gives more; GPUs only for work that can use them.
    """
    return replace(
        workers,
        cpus=workers.cpus or cpus,
        gpus=gpus,
        accelerator=workers.accelerator if gpus else None,
    )


def for_training(workers: Resources, config: TrainingConfig) -> TrainingConfig:
    """The config with the cores and GPUs per worker that the profile gives, where it gives any."""
    given = {"cpus_per_worker": workers.cpus, "gpus_per_worker": workers.gpus}
    return config.model_copy(update={name: value for name, value in given.items() if value})


def on_node(wanted: Resources, node: str) -> Resources:
    """`wanted`, on the node of this id and nowhere else.

    A label, not `NodeAffinitySchedulingStrategy`: tasks, Ray Data and Ray Train all take labels.
    """
    return replace(wanted, labels={**wanted.labels, NODE_ID: node})


def times(wanted: Resources, count: int) -> Resources:
    """What `count` workers ask for that must all fit on one node."""
    return replace(
        wanted,
        cpus=wanted.cpus * count,
        gpus=wanted.gpus * count,
        memory=None if wanted.memory is None else wanted.memory * count,
        custom={name: amount * count for name, amount in wanted.custom.items()},
    )


def asked(step: Step, *, one_node: bool = False) -> Iterator[Resources]:
    """Everything that must fit on one node each: the step, a worker, a worker of each training.

    With `one_node` the workers of a training must all fit on it together.
    """
    yield own_resources(step)
    trained = list(trainings(step))
    for each, count in trained:
        yield times(each, count) if one_node else each
    if not trained:
        workers = worker_resources(step)
        yield for_call(workers, cpus=workers.cpus, gpus=workers.gpus)


def trainings(step: Step) -> Iterator[tuple[Resources, int]]:
    """What a worker of each training of the step asks for, and how many run at the same time."""
    workers = worker_resources(step)
    for config in _values(step.config):
        if isinstance(config, TrainingConfig):
            placed = for_training(workers, config)
            each = for_call(workers, cpus=placed.cpus_per_worker, gpus=placed.gpus_per_worker)
            yield each, placed.workers


def _values(config: Config) -> list[Any]:
    return [getattr(config, name) for name in type(config).model_fields]


def task_options(wanted: Resources) -> dict[str, Any]:
    """Ray's `.options(...)` for these resources; Ray Data's `map_batches` takes them too."""
    options: dict[str, Any] = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus or None}
    if wanted.memory is not None:
        options["memory"] = wanted.memory
    if wanted.accelerator is not None:
        options["accelerator_type"] = wanted.accelerator
    if wanted.custom:
        options["resources"] = dict(wanted.custom)
    if wanted.labels:
        options["label_selector"] = dict(wanted.labels)
    return options

"""Cluster profiles: which Ray a run uses, and what each step asks of its nodes there.

A profile is a YAML file in `configs/cluster/`. The same pipeline runs unchanged on a laptop, on one
GPU machine, and on a cluster where CPU steps go to CPU nodes and training to GPU nodes:

    ray:                          # arguments of ray.init
      address: local              # local: start one here; auto: join the one that runs here
      object_store_memory: 200MB
    steps:                        # patterns of step names -> resources, timeout; later ones win;
                                  # a step that only hands out work passes them to its workers
      "pretrain*": {cpus: 4, gpus: 1, accelerator: A100}
    autoscaler: []                # kinds of nodes that may still be added, e.g. {cpus: 8, gpus: 1}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from goldcrest.cluster.api import Resources, parse_duration
from goldcrest.cluster.dag import Step
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.placement import (
    NODE_ID,
    asked,
    hands_out,
    own_resources,
    times,
    trainings,
)

_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(value: Any) -> Any:
    """Bytes in text such as "200MB" (powers of 1000) or "2GiB" (powers of 1024)."""
    if not isinstance(value, str):
        return value
    match = _BYTES.match(value)
    if match is None:
        raise ValueError(f"'{value}' is not an amount of memory; write it as 200MB or 2GiB")
    unit = match[2].upper().rstrip("B")
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** _POWERS[unit.rstrip("I")])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def _seconds(value: Any) -> float | None:
    try:
        return parse_duration(value)
    except InputError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RayConfig(_Strict):
    """How to reach or start Ray. What is None is left to Ray."""

    address: str = Field(
        "local", description="local: start one here; auto: join a running one; or host:port"
    )
    num_cpus: int | None = Field(None, ge=1, description="CPU cores of a Ray started here")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a Ray started here")
    resources: dict[str, float] = Field({}, description="custom resources of a Ray started here")
    labels: dict[str, str] = Field({}, description="node labels of a Ray started here")
    object_store_memory: Bytes | None = Field(None, description="shared memory for objects, bytes")
    dashboard: bool = Field(False, description="start Ray's dashboard on the local machine")
    runtime_env: dict[str, Any] = Field({}, description="Ray's runtime_env for every worker")


class StepResources(_Strict):
    """What a pipeline's config or a profile replaces of what a task asks for."""

    cpus: float | None = Field(None, ge=0, description="CPU cores")
    gpus: float | None = Field(None, ge=0, description="GPUs, or a share of one")
    memory: Bytes | None = Field(None, ge=0, description="bytes, or text such as 2GiB")
    accelerator: str | None = Field(None, description="Ray's accelerator type, such as A100")
    custom: dict[str, float] | None = Field(None, description="Ray custom resources")
    labels: dict[str, str] | None = Field(None, description="labels of the node")
    timeout: Annotated[float, BeforeValidator(_seconds)] | None = Field(
        None, gt=0, description="seconds, or text such as 90s, 10m, 2h, 1d"
    )

    def changes(self) -> dict[str, Any]:
        """Only what was given."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class NodeKind(_Strict):
    """What one node has to offer."""

    name: str = Field("node", description="what to call it in a message")
    cpus: float = Field(0.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    memory: Bytes | None = Field(None, description="bytes; None: unknown, taken as enough")
    custom: dict[str, float] = {}
    labels: dict[str, str] = {}


class Profile(_Strict):
    """A cluster profile; the default is this machine."""

    name: str = Field("this machine", description="how messages call it; a file's name by default")
    ray: RayConfig = RayConfig()
    steps: dict[str, StepResources] = Field(
        {}, description="patterns of step names (as in a shell) -> resources; later ones win"
    )
    autoscaler: tuple[NodeKind, ...] = Field(
        (), description="kinds of nodes that an autoscaler may add; they count as there"
    )

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Read a profile; an InputError names the file, the field and what is allowed."""
        import yaml

        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read the cluster profile {path}: {error.strerror}") from None
        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise InputError(f"cluster profile {path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"cluster profile {path} must be a mapping with ray: and steps:")
        try:
            return cls(**{"name": path.stem, **values})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"cluster profile {path}: {place}: {first['msg']}") from None

    def overrides(self) -> list[tuple[str, dict[str, Any]]]:
        """(pattern, changes) pairs for `dag.walk`."""
        return [(pattern, wanted.changes()) for pattern, wanted in self.steps.items()]


def placements(config: Any, profile: Profile | None) -> list[tuple[str, dict[str, Any]]]:
    """(pattern, changes) pairs for `dag.walk`: those of the pipeline's config, if its field `steps`
    has any, then those of the profile, which knows the cluster better and wins.

    None of them enters a key: where a step runs does not change what it makes.
    """
    own: Mapping[str, StepResources] = getattr(config, "steps", {})
    given = [(pattern, wanted.changes()) for pattern, wanted in own.items()]
    return given + (profile.overrides() if profile is not None else [])


def running_nodes() -> list[NodeKind]:
    """What the nodes of the Ray that this process is attached to offer."""
    import ray

    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = dict(node["Resources"])
        cpus, gpus = resources.pop("CPU", 0.0), resources.pop("GPU", 0.0)
        memory = resources.pop("memory", None)
        nodes.append(
            NodeKind(
                name=node["NodeManagerHostname"],
                cpus=cpus,
                gpus=gpus,
                memory=None if memory is None else int(memory),
                custom=resources,
                labels=node.get("Labels") or {},
            )
        )
    return nodes


def lacking(wanted: Resources, node: NodeKind) -> list[str]:
    """What `node` lacks of what a step wants, in words; empty if it can run the step."""
    lacks = []
    if wanted.cpus > node.cpus:
        lacks.append(f"{wanted.cpus:g} CPU cores ({node.name} has {node.cpus:g})")
    if wanted.gpus > node.gpus:
        lacks.append(f"{wanted.gpus:g} GPUs ({node.name} has {node.gpus:g})")
    if wanted.memory is not None and node.memory is not None and wanted.memory > node.memory:
        lacks.append(
            f"{wanted.memory / 1e9:.3g} GB of memory ({node.name} has {node.memory / 1e9:.3g})"
        )
    if wanted.accelerator is not None and not _has_accelerator(wanted.accelerator, node):
        lacks.append(f"a GPU of type {wanted.accelerator}")
    for name, amount in wanted.custom.items():
        if amount > node.custom.get(name, 0.0):
            lacks.append(f"{amount:g} of the resource '{name}'")
    for label, value in wanted.labels.items():
        if not _label_fits(value, node.labels.get(label)):
            lacks.append(f"the label {label}={value}")
    return lacks


def _has_accelerator(kind: str, node: NodeKind) -> bool:
    named = node.labels.get("ray.io/accelerator-type") == kind
    return named or node.custom.get(f"accelerator_type:{kind}", 0.0) > 0


def _label_fits(selector: str, value: str | None) -> bool:
    """Ray's label selectors: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    negated = selector.startswith("!")
    bare = selector.removeprefix("!")
    inside = re.fullmatch(r"in\((.*)\)", bare)
    allowed = [part.strip() for part in inside[1].split(",")] if inside else [bare]
    return (value in allowed) != negated


def check_placement(
    steps: Sequence[Step],
    nodes: Sequence[NodeKind],
    profile: Profile,
    *,
    one_node: bool = False,
) -> None:
    """Refuse steps that no node can ever run, and trainings for whose workers there is no room at
    the same time on all nodes together (unless more may be added): Ray would wait for ever.

    `one_node`: the workers of a step must run together on its own node (a store in a bucket).
    Raises InputError that names the first such step and what the best node lacks.
    """
    offered = [*nodes, *profile.autoscaler]
    for step in steps:
        for wanted in asked(step, one_node=one_node):
            shortages = [lacking(wanted, node) for node in offered]
            if not all(shortages):
                continue
            least = min(shortages, key=len, default=["a node"])
            raise InputError(
                f"step '{step.name}' asks for {' and '.join(least)}: no node of '{profile.name}' "
                "can run it",
                hint="choose another cluster profile, or ask for less under steps: in this one or "
                "in the step's config",
            )
        if not profile.autoscaler and not one_node:
            _check_room_for_all(step, nodes, profile)


def _check_room_for_all(step: Step, nodes: Sequence[NodeKind], profile: Profile) -> None:
    """InputError for a training that wants more workers than there is room for, beside its step."""
    own = own_resources(step)
    hosts = [place for place, node in enumerate(nodes) if not lacking(own, node)]
    for each, count in trainings(step):
        most = 0
        for host in hosts:
            left = list(nodes)
            left[host] = left[host].model_copy(update={"cpus": left[host].cpus - own.cpus})
            most = max(most, sum(_room(each, node, count) for node in left))
        if most < count:
            raise InputError(
                f"step '{step.name}' trains with {count} workers at the same time, and "
                f"'{profile.name}' has room for {most} of {each.cpus:g} CPU cores and "
                f"{each.gpus:g} GPUs each",
                hint="lower the training's workers, cpus_per_worker or gpus_per_worker; of a "
                "cluster that grows, say so under autoscaler: in its profile",
            )


def _room(each: Resources, node: NodeKind, most: int) -> int:
    """How many workers, up to `most`, the node has room for."""
    return next((n for n in range(most, 0, -1) if not lacking(times(each, n), node)), 0)


def beside_its_workers(step: Step, nodes: Sequence[NodeKind]) -> Resources:
    """What a step asks for whose workers must run on its own node: a node large enough for them.

    Nodes that are too small are excluded, not the others named: one that joins later is welcome.
    Where all are too small nothing is excluded, and the step says what it lacks.
    """
    own = own_resources(step)
    if not hands_out(step):
        return own
    # A worker takes a core where nothing else is said; the head of a cluster often offers none.
    wants = [replace(w, cpus=max(w.cpus, 1.0)) for w in asked(step, one_node=True)]
    possible = [node for node in nodes if not lacking(own, node)]
    small = [node for node in possible if any(lacking(wanted, node) for wanted in wants)]
    if not small or len(small) == len(possible):
        return own
    excluded = ",".join(node.labels[NODE_ID] for node in small)
    return replace(own, labels={NODE_ID: f"!in({excluded})", **own.labels})

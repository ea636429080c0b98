"""The thin face of `cluster` that tasks see: Task, Config, Artifact, Output, Runtime.

Nothing here imports ray, mlflow or torch at import time, so a task is unit-tested without any of
them: build an `Artifact` on a folder, an `Output` on another, call the task.

    class ClusterConfig(Config):
        method: str = Field("cimc", description="a file in kernels/clustering")

    @task(cpus=2, retry_on=(OSError,), timeout="2h")
    def cluster(cfg: ClusterConfig, ivectors: Artifact, out: Output) -> None: ...

    node = cluster.bind(cfg, ivectors=ivectors_node)      # a node of a Ray DAG
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints, runtime_checkable

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from goldcrest.cluster.artifact import Artifact, Output, ShardWriter
from goldcrest.cluster.errors import GoldcrestError, InputError, StepError
from goldcrest.cluster.markers import DoesNotChangeResult, InputFiles
from goldcrest.cluster.training_config import TrainingConfig

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

__all__ = [
    "Artifact",
    "Config",
    "DoesNotChangeResult",
    "GoldcrestError",
    "InputError",
    "InputFiles",
    "Objective",
    "Output",
    "Resources",
    "Runtime",
    "ShardWriter",
    "StepError",
    "Task",
    "Trained",
    "TrainingConfig",
    "UnevenObjective",
    "Whole",
    "task",
]


class Config(BaseModel):
    """A typed, validated, immutable configuration. Unknown fields are errors.

    Every field is documented by `Field(description=...)` with its unit and its place in the paper.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_groups(cls, data: Any) -> Any:
        """A group that is given in part keeps the rest of the default that stands in its place.

        Without this `-o pretrain.training.epochs=3` would quietly replace the batch size and the
        learning rate that the pipeline has chosen by those of any `TrainingConfig`.
        """
        return _over(cls.model_fields, {}, data) if isinstance(data, Mapping) else data


def _over(
    fields: Mapping[str, FieldInfo], standing: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """`given` values, where needed over those that are `standing` there or are a field's default.

    Where a field takes one of several classes of groups, the given one stands alone.
    """
    made = {**standing, **given}
    for name in fields.keys() & given.keys():
        default, value = standing.get(name, fields[name].default), given[name]
        kind = type(default)
        if not isinstance(default, BaseModel) or not isinstance(value, Mapping):
            continue
        if fields[name].annotation in (kind, kind | None):
            chosen = {each: getattr(default, each) for each in default.model_fields_set}
            made[name] = _over(kind.model_fields, chosen, value)
    return made


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one step asks of the node that runs it; for a step that only hands out work (`cpus=0`),
    what each of its workers asks (cluster/placement.py).

    `cpus` and `gpus` are counts (fractions allowed), `memory` is bytes, `accelerator` is a Ray
    accelerator type such as "A100", `custom` are Ray custom resources, `labels` Ray node labels.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None
    accelerator: str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|m|h|d)?\s*$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}


def parse_duration(value: str | float | None) -> float | None:
    """Seconds in `value`: a number of seconds, or text such as "90s", "10m", "2h", "1d"."""
    if value is None or isinstance(value, int | float):
        return value
    match = _DURATION.match(value)
    if match is None:
        raise InputError(f"'{value}' is not a duration", hint="write it as 90s, 10m, 2h or 1d")
    return float(match[1]) * _SECONDS[match[2]]


class Task:
    """A step of work: a function with declared resources and a typed config.

    The function's parameters are the config first, then the input artifacts, then `out: Output`;
    a last parameter `**name: Artifact` takes any further inputs, by the names that `bind` gives.
    `version` is part of the key: bump it when the same config must give another result.
    `check(cfg)` is asked in the driver before any step of a run starts, where this step is to run:
    it raises a GoldcrestError for what can be known to fail, a package that is missing, say.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *,
        resources: Resources,
        version: int,
        seeded: bool,
        retries: int,
        retry_on: tuple[type[BaseException], ...],
        timeout: float | None,
        check: Callable[[Any], None] | None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = function.__name__
        self.resources = resources
        self.version = version
        self.seeded = seeded
        self.retries = retries
        self.retry_on = retry_on
        self.timeout = timeout
        self.check = check
        signature = inspect.signature(function).parameters
        self.open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        parameters = [name for name, p in signature.items() if p.kind is not p.VAR_KEYWORD]
        if len(parameters) < 2 or parameters[-1] != "out":
            raise TypeError(f"task {self.name}: write it as (cfg, *inputs, out)")
        self.inputs = tuple(parameters[1:-1])
        self._config_parameter = parameters[0]

    @functools.cached_property
    def config_class(self) -> type[Config]:
        """The class of the first parameter, a `Config`."""
        return typing.cast(type[Config], get_type_hints(self.function)[self._config_parameter])

    def __call__(self, cfg: Config, *inputs: Artifact | None, out: Output, **named: Any) -> None:
        """Run the step's function here and now, without Ray."""
        self.function(cfg, *inputs, out=out, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_import_task, (self.function.__module__, self.name))

    def bind(
        self,
        cfg: Config,
        *inputs: Any,
        name: str | None = None,
        seed: int = 0,
        resources: Mapping[str, Any] | None = None,
        **named_inputs: Any,
    ) -> Any:
        """Bind this task into a Ray DAG and return the node.

        `inputs` are nodes (or None for an input that this chain does not have), positional or by
        the names of the function's parameters; `name` names the step where a task is used twice;
        `seed` enters the key of a seeded task; `resources` overrides fields of `Resources`.
        """
        from goldcrest.cluster import dag

        if len(inputs) > len(self.inputs):
            raise TypeError(f"task {self.name} takes {len(self.inputs)} inputs {self.inputs}")
        bound = dict(zip(self.inputs, inputs, strict=False))
        for parameter, node in named_inputs.items():
            unknown = parameter not in self.inputs and not self.open_ended
            if unknown or parameter in bound:
                raise TypeError(f"task {self.name}: unexpected input '{parameter}'")
            bound[parameter] = node
        return dag.bind(self, cfg, bound, name=name, seed=seed, resources=resources)


def _import_task(module: str, name: str) -> Task:
    """Find a task again on a worker: tasks travel by name, not by value."""
    import importlib

    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, Task):
        raise TypeError(f"{module}.{name} is not a task")
    return found


def task(
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    memory: int | None = None,
    version: int = 1,
    seeded: bool = True,
    retries: int = 2,
    retry_on: tuple[type[BaseException], ...] = (OSError,),
    timeout: str | float | None = None,
    check: Callable[[Any], None] | None = None,
) -> Callable[[Callable[..., None]], Task]:
    """Make a function a `Task`.

    A step that only hands work to `out.runtime` declares `cpus=0`: the work it hands out declares
    its own, and a step that waits never holds a core that its own work needs. `retries` counts
    repeats after a lost worker or an exception named in `retry_on`; for `check` see `Task`.
    """

    def decorate(function: Callable[..., None]) -> Task:
        return Task(
            function,
            resources=Resources(cpus=cpus, gpus=gpus, memory=memory),
            version=version,
            seeded=seeded,
            retries=retries,
            retry_on=retry_on,
            timeout=parse_duration(timeout),
            check=check,
        )

    return decorate


Whole = Callable[..., AbstractContextManager[None]]
"""`with whole(*parameters):` -- inside, these parameters are whole on every worker."""


@runtime_checkable
class Objective(Protocol):
    """What the training engine needs of anything that is trained by gradients.

    Structural: kernels and tasks implement it without importing `cluster`. It is sent to every
    training worker once, so it holds settings and handles (paths, artifacts), not big tensors.
    """

    def build_model(self) -> torch.nn.Module:
        """A freshly initialised model; called under the run's seed, the same on every worker."""
        ...

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: `[{"params": [...], "lr_scale": 1.0, "weight_decay": ...}, ...]`."""
        ...

    def __len__(self) -> int:
        """Number of examples in one epoch."""
        ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The examples at `indices` as a batch; all randomness comes from `rng`."""
        ...

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        """Named scalar losses; the engine minimises their sum, inside its forward pass."""
        ...

    def masks(self, model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
        """Weights that are held at zero, `{}` for none: parameter name -> mask, True where kept.

        Boolean, in the shape of the parameter. The engine takes masked weights out of the gradients
        (so out of the norm that `clip_norm` looks at) and sets them to exact zero after every step,
        in the model's precision and in the fp32 weights behind it. Called once, before training.
        """
        ...

    def after_step(self, model: torch.nn.Module, whole: Whole) -> None:
        """Called after every optimizer step, e.g. to move an EMA teacher inside the model.

        Under ZeRO 3 a worker holds parts of the parameters. Those that are read or changed here are
        whole inside `with whole(*parameters):` and nowhere else; changes are kept when it ends. Ask
        for few at a time: they must fit beside everything else.
        """
        ...

    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        """Metrics after an epoch, `{}` for none; the model is in eval mode, without gradients."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Extra state to keep in checkpoints besides model and optimizer, `{}` for none."""
        ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...


@runtime_checkable
class UnevenObjective(Objective, Protocol):
    """An objective whose examples differ in size, and in their share of a step's mean loss.

    Its `losses` are means over what a batch holds. Chunks of a step hold more or less of it, so the
    engine weighs each chunk by what `weights` says: a step's loss is the mean over all of the step,
    however it is cut.
    """

    def sizes(self) -> np.ndarray:
        """Units of each example (tokens, frames), (N,) int: what `batch_units` counts."""
        ...

    def weights(self) -> np.ndarray:
        """What each example adds to a mean (its tokens with a loss), (N,) positive numbers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the training engine gives back: full fp32 weights, extra state, history, measurements.

    `history` has one row per epoch (`{"epoch": 0, "loss": ..., ...}`, deterministic);
    `measurements` holds throughput, hours, energy and memory, which differ from run to run.
    """

    model_state: dict[str, torch.Tensor]
    extra_state: dict[str, torch.Tensor]
    history: list[dict[str, float]]
    measurements: dict[str, float]


class Runtime(Protocol):
    """Where a step's own fan-out runs: on the Ray cluster in a run, in this process in a test."""

    @property
    def gpus(self) -> float:
        """GPUs that the cluster profile gives each worker of this step.

        Work that can use one asks for it (`map(..., gpus=runtime.gpus)`) and computes on "cuda".
        """
        ...

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        note: str = "",
    ) -> Iterator[Any]:
        """`function(item)` for every item, results in the order of the items."""
        ...

    def stream(
        self,
        shards: Sequence[Path],
        transform: Callable[..., Callable[[pa.Table], pa.Table]],
        arguments: Mapping[str, Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        workers: int = 2,
        batch_rows: int = 32,
    ) -> Iterator[pa.Table]:
        """Parquet shards through a pool of long-lived workers, row order kept.

        `transform(**arguments)` is built once per worker and maps tables of at most `batch_rows`
        rows to tables; memory stays bounded by the batches in flight, never by the corpus.
        """
        ...

    def train(self, objective: Objective, config: TrainingConfig, out: Output) -> Trained:
        """Run the training engine; checkpoints live in `out.scratch` and survive a kill."""
        ...


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN; the basis of every key."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )

"""Tasks as nodes of a Ray DAG, and the walk that turns such a DAG into steps with keys.

The only file that touches `ray.dag`: `DAGNode.execute()` is deprecated, so nodes are bound here,
walked here, and submitted one by one in `run.py`.

A node holds the `Binding` (task, config, seed, name, resources) as its one positional argument and
the upstream nodes as keyword arguments, named by the task's parameters. Its function is
`worker.execute_step`, the same that `run.py` submits.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from goldcrest.cluster.api import Config, Resources, Task
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.keys import Fingerprints, canonical_config, step_key


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A task with everything that `bind` was told, apart from its inputs."""

    task: Task
    config: Config
    name: str
    seed: int
    resources: Mapping[str, Any] = field(default_factory=dict)  # overrides of Resources' fields
    inputs: tuple[str, ...] = ()  # all parameters, bound or not, in the task's order


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node of the DAG, ready to be planned and run."""

    name: str
    task: Task
    config: Config
    seed: int
    inputs: Mapping[str, str | None]  # parameter -> name of the step that makes it
    resources: Resources
    timeout: float | None  # seconds
    canonical: Mapping[str, Any]  # the config as it enters the key
    key: str
    input_keys: Mapping[str, str | None]  # parameter -> key of that step

    @property
    def task_name(self) -> str:
        """The task's full name: two tasks may share a function's name, not a module as well."""
        return task_name(self.task)

    @property
    def upstream(self) -> tuple[str, ...]:
        """Names of the steps that this one reads, each once."""
        return tuple(dict.fromkeys(name for name in self.inputs.values() if name is not None))


def task_name(task: Task) -> str:
    """`module.function` of a task, as it stands in keys and manifests."""
    return f"{task.function.__module__}.{task.name}"


def bind(
    task: Task,
    config: Config,
    inputs: Mapping[str, Any],
    *,
    name: str | None,
    seed: int,
    resources: Mapping[str, Any] | None,
) -> Any:
    """A Ray DAG node for `task`; use `Task.bind`, which sorts the inputs by parameter."""
    import ray

    from goldcrest.cluster.worker import execute_step

    if not isinstance(config, task.config_class):
        raise TypeError(
            f"task {task.name} takes a {task.config_class.__name__}, not a {type(config).__name__}"
        )
    overrides = dict(resources or {})
    override_resources(task.resources, overrides, f"task {task.name}")
    bound = {}
    parameters = (*task.inputs, *(name for name in inputs if name not in task.inputs))
    for parameter in parameters:
        node = inputs.get(parameter)
        if node is None:
            _check_optional(task, parameter, given=parameter in inputs)
        elif not is_node(node):
            raise TypeError(
                f"task {task.name}: input '{parameter}' is a {type(node).__name__}; "
                "give what another task's bind returned"
            )
        else:
            bound[parameter] = node
    binding = Binding(
        task=task,
        config=config,
        name=name or task.name,
        seed=seed,
        resources=overrides,
        inputs=parameters,
    )
    remote: Any = ray.remote(execute_step)
    return remote.options(name=binding.name).bind(binding, **bound)


def _check_optional(task: Task, parameter: str, *, given: bool) -> None:
    """An input that nobody bound must have None as its default; further inputs are nodes."""
    if parameter not in task.inputs:
        raise TypeError(f"task {task.name}: the further input '{parameter}' is None; leave it out")
    default = inspect.signature(task.function).parameters[parameter].default
    if not given and default is not None:
        raise TypeError(f"task {task.name}: input '{parameter}' is missing")


def is_node(value: Any) -> bool:
    """Whether `value` is what `bind` returns."""
    from ray.dag import DAGNode

    return isinstance(value, DAGNode)


def override_resources(base: Resources, changes: Mapping[str, Any], where: str) -> Resources:
    """`base` with the fields in `changes` replaced; an InputError names what is wrong."""
    known = {f.name for f in dataclasses.fields(Resources)}
    for name, value in changes.items():
        if name not in known:
            raise InputError(
                f"{where}: '{name}' is no resource", hint=f"use one of {', '.join(sorted(known))}"
            )
        if name in ("cpus", "gpus") and not (_is_number(value) and value >= 0):
            raise InputError(f"{where}: {name} must be a number of at least 0, not {value!r}")
    return dataclasses.replace(base, **changes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def walk(
    built: Any,
    *,
    fingerprints: Fingerprints,
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> list[Step]:
    """The steps behind the node or nodes that a pipeline's `build` returned, inputs first.

    `overrides` are (pattern of step names, resources and timeout) pairs of the pipeline's config
    and of a cluster profile (`profile.placements`), later ones win.
    """
    ends = list(built) if isinstance(built, list | tuple) else [built]
    if not ends or not all(is_node(node) for node in ends):
        raise InputError("a pipeline's build() must return a bound task or a list of them")
    nodes = _upstream_first(ends)
    steps: dict[int, Step] = {}
    names: set[str] = set()
    for node in nodes:
        step = _step(node, steps, fingerprints, overrides)
        if step.name in names:
            raise InputError(
                f"two steps of the pipeline are called '{step.name}'",
                hint=f"give one of them another name: {step.task.name}.bind(..., name=...)",
            )
        names.add(step.name)
        steps[id(node)] = step
    return list(steps.values())


def _upstream_first(ends: Sequence[Any]) -> list[Any]:
    """All nodes, each once, every node after its inputs; iterative, so chains may be long."""
    order: dict[int, Any] = {}
    stack = [(node, False) for node in reversed(ends)]
    while stack:
        node, ready = stack.pop()
        if id(node) in order:
            continue
        if ready:
            order[id(node)] = node
        else:
            stack.append((node, True))
            stack.extend((inner, False) for inner in reversed(list(node.get_kwargs().values())))
    return list(order.values())


def _step(
    node: Any,
    steps: Mapping[int, Step],
    fingerprints: Fingerprints,
    overrides: Sequence[tuple[str, Mapping[str, Any]]],
) -> Step:
    arguments = node.get_args()
    if len(arguments) != 1 or not isinstance(arguments[0], Binding):
        raise InputError(f"{node} is not a bound task", hint="bind steps with Task.bind")
    binding = arguments[0]
    upstream = {name: steps[id(inner)] for name, inner in node.get_kwargs().items()}
    made_by = {name: upstream.get(name) for name in binding.inputs}
    input_keys = {name: step.key if step else None for name, step in made_by.items()}
    resources = override_resources(
        binding.task.resources, binding.resources, f"step '{binding.name}'"
    )
    timeout = binding.task.timeout
    for pattern, wanted in overrides:
        if fnmatch.fnmatchcase(binding.name, pattern):
            changes = dict(wanted)
            timeout = changes.pop("timeout", timeout)
            resources = override_resources(resources, changes, f"steps '{pattern}'")
    try:
        canonical = canonical_config(binding.config, fingerprints)
    except InputError as error:
        raise InputError(f"step '{binding.name}': {error.message}", hint=error.hint) from None
    key = step_key(
        task=task_name(binding.task),
        version=binding.task.version,
        config=canonical,
        inputs=input_keys,
        seed=binding.seed if binding.task.seeded else None,
    )
    return Step(
        name=binding.name,
        task=binding.task,
        config=binding.config,
        seed=binding.seed,
        inputs={name: step.name if step else None for name, step in made_by.items()},
        resources=resources,
        timeout=timeout,
        canonical=canonical,
        key=key,
        input_keys=input_keys,
    )

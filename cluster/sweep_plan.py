"""What is asked of a sweep, checked before anything starts: options, points, the watched curve."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from goldcrest.cluster.api import TrainingConfig
from goldcrest.cluster.config_file import Tree, validate
from goldcrest.cluster.dag import Step, walk
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.keys import Fingerprints, digest
from goldcrest.cluster.plan import pipeline_name
from goldcrest.cluster.profile import Profile, placements
from goldcrest.cluster.sweep_space import Space, Values

SearchName = Literal["random", "optuna", "grid"]
SchedulerName = Literal["fifo", "asha", "pbt"]
Mode = Literal["min", "max"]

_PROBED = 4  # points whose steps are compared to see which ones a space touches
_CHECKED = 32  # drawn points that are validated where a search proposes its own later


class SweepOptions(BaseModel):
    """How a space is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(min_length=1, description="dotted path into the metrics of a run")
    mode: Mode = Field("min", description="which values of it are good")
    trials: int | None = Field(None, ge=1, le=10_000, description="None: the whole grid")
    search: SearchName = Field("random", description="where points come from")
    scheduler: SchedulerName = Field("fifo", description="which trials are given up early")
    parallel: int | None = Field(None, ge=1, le=1000, description="trials at once; None: chosen")
    seed: int = Field(0, ge=0, description="seed of the search")
    watch: str | None = Field(
        None, description="NAME or STEP.NAME of the curve that schedulers compare; None: chosen"
    )
    watch_mode: Mode = Field("min", description="which values of that curve are good")
    grace: int = Field(
        3, ge=1, description="rows of it before asha may stop a trial, or between looks of pbt"
    )
    reduction: float = Field(3.0, gt=1, description="asha: one trial in this many goes on")


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep that may start."""

    name: str
    asked: str  # digest of everything that makes this sweep this sweep
    facts: dict[str, Any]  # the same, readable
    points: list[Values]  # all points, where the search knows them beforehand; else []
    steps: list[Step]  # of one trial
    touched: list[str]  # names of the steps that differ between trials
    watched: tuple[str, ...]  # steps whose curve is watched, () for any


def plan_sweep(
    pipeline: Any,
    tree: Tree,
    space: Space,
    options: SweepOptions,
    *,
    profile: Profile | None = None,
    name: str | None = None,
) -> SweepPlan:
    """Check everything that can be checked without running a trial; InputError says what is wrong.

    `pipeline` is a module (or class) with `Config` and `build`, `tree` the config's plain values.
    """
    if options.search == "optuna":
        _check_optuna()
    validate(pipeline.Config, tree, where="the configuration")
    points = _points(space, options)
    drawn = points or space.random_points(_CHECKED, options.seed)
    space.check(pipeline.Config, tree, drawn)
    steps, touched = _probe(pipeline, tree, space, drawn[:_PROBED], profile or Profile())
    facts = {
        "pipeline": str(getattr(pipeline, "__name__", pipeline)),
        "config": tree,
        "space": {path: axis.model_dump(exclude_none=True) for path, axis in space.axes.items()},
        "options": options.model_dump(exclude={"trials", "parallel"}),  # more of it is the same
    }
    asked = digest(facts)
    return SweepPlan(
        name=name or f"sweep-{pipeline_name(pipeline)}-{asked[:8]}",
        asked=asked,
        facts=facts,
        points=points,
        steps=steps,
        touched=touched,
        watched=_watched(options, steps, touched),
    )


def _points(space: Space, options: SweepOptions) -> list[Values]:
    """All points of the sweep, [] where they depend on results."""
    if options.search == "grid" and options.scheduler != "pbt":
        return space.grid_points(options.trials)
    if options.trials is None:
        raise InputError("how many trials are to run?", hint="give --trials N")
    if options.scheduler == "pbt" and options.search != "random":
        raise InputError(
            f"pbt proposes its own points and cannot take those of {options.search}",
            hint="leave --search out, or choose another --scheduler",
        )
    if options.scheduler == "pbt" or options.search == "optuna":
        return []
    return space.random_points(options.trials, options.seed)


def _check_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise InputError(
            "--search optuna needs Optuna, which is not installed",
            hint="install the extra: pip install 'goldcrest[sweep]'; or use --search random",
        )


def _probe(
    pipeline: Any, tree: Tree, space: Space, points: Sequence[Values], profile: Profile
) -> tuple[list[Step], list[str]]:
    """The steps of the first point, and the names of those that differ between the points.

    Inputs that are not there (a corpus) are found here as well.
    """
    fingerprints = Fingerprints()
    first: list[Step] = []
    keys: dict[str, set[str]] = {}
    for values in points:
        config = space.configure(pipeline.Config, tree, values, where=space.where)
        steps = walk(
            pipeline.build(config),
            fingerprints=fingerprints,
            overrides=placements(config, profile),
        )
        first = first or steps
        for step in steps:
            keys.setdefault(step.name, set()).add(step.key)
    touched = [name for name, seen in keys.items() if len(seen) > 1 or len(points) == 1]
    return first, touched


def _watched(options: SweepOptions, steps: list[Step], touched: list[str]) -> tuple[str, ...]:
    """The steps whose curve is compared: what is asked for, else the first training that differs.

    () where no touched step trains: then the rows of any step count, in the order they come.
    """
    if options.watch and "." in options.watch:
        wanted = options.watch.rpartition(".")[0]
        names = [step.name for step in steps]
        if wanted not in names:
            raise InputError(
                f"--watch {options.watch}: there is no step '{wanted}'",
                hint=f"the steps are: {', '.join(names)}",
            )
        return (wanted,)
    training = [step.name for step in steps if step.name in touched and _trains(step)]
    return tuple(training[:1])


def _trains(step: Step) -> bool:
    """Whether the step's config sets up the training engine."""
    values = (getattr(step.config, name) for name in type(step.config).model_fields)
    return any(isinstance(value, TrainingConfig) for value in values)

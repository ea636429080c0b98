"""What a run tells about itself: events while it goes, a result at its end.

`run` sends every event to its listeners (progress on the terminal, MLflow, the report) in the
driver's process and in one thread. A listener that raises is switched off with one warning; it
never fails a run. Events hold plain values only, so `as_json` of any of them fits into a line of
`events.jsonl` in the run's folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from goldcrest.cluster.plan import Plan

StepState = Literal["waiting", "running", "cached", "ran", "failed", "skipped"]
"""waiting -> running -> ran | failed; a step may also be cached at once, or skipped."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a step failed: a sentence, what to do about it, and the last lines of its log."""

    step: str | None  # None: the run failed outside its steps
    message: str
    hint: str | None = None
    log: tuple[str, ...] = ()  # at most the last 20 lines


def interruption(what: str) -> Failure:
    """Why a run or sweep did not succeed that was stopped by Ctrl-C or a signal."""
    return Failure(
        step=None,
        message=f"the {what} was interrupted; the same command continues where it stopped",
    )


def stable_status(status: str) -> str:
    """A status as the stable JSON has it: succeeded or failed; the error tells an interruption."""
    return "succeeded" if status == "succeeded" else "failed"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in run `run_id`, at `time` (seconds since the epoch)."""

    run_id: str
    time: float = field(default_factory=time.time)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `events.jsonl`, the kind of the event under "event"."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"event": type(self).__name__, **values}


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The plan is made; nothing has run yet. The first event of every run."""

    pipeline: str
    plan: Plan
    config: Mapping[str, Any]  # the pipeline's whole config, plain values
    folder: Path  # the run's folder in the store


@dataclass(frozen=True, kw_only=True)
class StepChanged(Event):
    """A step came into another state."""

    step: str
    state: StepState
    reason: str = ""  # why it runs, is cached or is skipped, in words
    place: str = ""  # host (and GPUs) where it runs, e.g. "node7 gpu 0,1"
    seconds: float | None = None  # of the step's own work; for a cached step, when it once ran
    key: str = ""
    path: str | None = None  # the artifact's folder, once there is one
    metrics: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None  # once there is one
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class StepProgress(Event):
    """How far a running step is."""

    step: str
    share: float | None = None  # in [0, 1], None where unknown
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StepLog(Event):
    """One row of a step's curves over time, e.g. one epoch."""

    step: str
    index: int  # 0, 1, 2 ... within the step
    row: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The last event of every run that was not killed."""

    result: RunResult

    def as_json(self) -> dict[str, Any]:
        """As of any event; the status is the full one: an interrupted run is reported as such."""
        values = super().as_json()
        values["result"]["status"] = self.result.status
        return values


@dataclass(kw_only=True)
class StepResult:
    """One line of the result's table."""

    name: str
    key: str
    state: StepState
    seconds: float
    reason: str


@dataclass(kw_only=True)
class RunResult:
    """What a run came to; `as_json` is the stable form that `--json FILE` writes.

    `report` is filled in by whoever writes the report.
    """

    run: str
    pipeline: str
    status: Literal["succeeded", "failed", "interrupted"]
    seconds: float
    steps: list[StepResult]
    metrics: dict[str, Any] = field(default_factory=dict)
    measurements: dict[str, Any] = field(default_factory=dict)
    bundles: dict[str, str] = field(default_factory=dict)  # name -> folder
    report: str | None = None
    quarantined: int = 0
    error: Failure | None = None

    def as_json(self) -> dict[str, Any]:
        """The stable JSON of a run; measurements are merged into the metrics.

        Its status is succeeded or failed; the error of an interrupted run says that it was one.
        """
        from goldcrest.cluster.artifact import merge_nested

        error = self.error and {
            "step": self.error.step,
            "message": self.error.message,
            "hint": self.error.hint,
        }
        return {
            "run": self.run,
            "pipeline": self.pipeline,
            "status": stable_status(self.status),
            "seconds": round(self.seconds, 3),
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "metrics": merge_nested(merge_nested({}, self.metrics), self.measurements),
            "bundles": dict(self.bundles),
            "report": self.report,
            "quarantined": self.quarantined,
            "error": error,
        }


class Listener(Protocol):
    """Somebody who wants to know how a run goes."""

    def on_event(self, event: Event) -> None:
        """Called in order, in the driver's one thread; return quickly."""
        ...


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if hasattr(value, "as_json"):
        return value.as_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return value

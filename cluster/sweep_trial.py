"""One trial of a sweep: a run of the pipeline inside an actor of Ray Tune.

The actor is only the run's driver: it holds no CPU core and waits, while its steps are Ray tasks of
their own beside it (a trial that held a core would keep its own steps from running). All trials use
one Ray and one store, so the prefix that several trials share is computed by whoever takes its
lease first; the others find it.

What the run tells becomes Tune results, in this order:

    {"steps": {...}}                       steps that changed their state
    {"rows": n, "score": x, "steps": ...}  row n of the watched curve; larger scores are better
    {"done": True, "end": {...}, "objective": x}   the metric, negated where less is better

A trial that Tune stops ends its run as Ctrl-C does: its steps are cancelled, so their cores and
leases are free again, and what it had finished stays in the store for others.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from goldcrest.cluster.config_file import Tree, flatten
from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.events import Event, RunResult, RunStarted, StepChanged, StepLog
from goldcrest.cluster.markers import relative_to
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.report import ReportWriter
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from goldcrest.cluster.sweep_space import Space, Values

_BEAT = 2.0  # seconds after which a trial without news lets Tune have a word
_CANCEL = 60.0  # seconds that a stopped trial's run gets to cancel its steps


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a sweep optimises: a dotted path into the metrics of a run."""

    metric: str
    mode: str = "min"  # or max

    @property
    def sign(self) -> float:
        """What makes the best value the largest."""
        return 1.0 if self.mode == "max" else -1.0

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        """The metric's value, None where these metrics have no such number."""
        found = numbers(metrics).get(self.metric)
        return found if found is not None and math.isfinite(found) else None


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among nested metrics by dotted path."""
    return {
        path: float(value)
        for path, value in flatten(dict(metrics)).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Which curve tells early how good a trial is: rows of `steps`, the number `name` in them.

    Without a name it is the last word of the goal where the rows have it, else the loss.
    """

    steps: tuple[str, ...] = ()  # one after the other; () for any step
    name: str | None = None
    mode: str = "min"
    goal: Goal

    def score(self, step: str, row: Mapping[str, float]) -> float | None:
        """The row's number, negated where less is better; None where nothing is watched in it."""
        if self.steps and step not in self.steps:
            return None
        word = self.goal.metric.rpartition(".")[2]
        name, mode = (self.name, self.mode) if self.name else (word, self.goal.mode)
        if not self.name and word not in row:
            name, mode = "loss", "min"
        value = row.get(name or "")
        if value is None or not math.isfinite(value):
            return None
        return float(value) if mode == "max" else -float(value)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every trial of a sweep must know."""

    sweep: str
    pipeline: Any
    config_class: Any
    tree: Tree
    space: Space
    folder: Path  # where the sweep was started: relative names of files are relative to it
    store_uri: str
    profile: Profile
    goal: Goal
    watch: Watch

    def run_id(self, number: int) -> str:
        """The name of a trial's run; the same when the sweep is repeated."""
        return f"{self.sweep}-{number:03d}"


class TrialActor(Trainable):
    """A Tune trainable that runs one trial after the other (actors are used again)."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Start the trial of `config`: {"number", "values", and "replay" for a recorded one}."""
        assert job is not None
        self._job = job
        self._trial = _start(job, config)

    def step(self) -> dict[str, Any]:
        """The next thing that the trial has to tell."""
        return self._trial.next()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End this trial if it still runs, start the next one in this process."""
        self._trial.end()
        self._trial = _start(self._job, new_config)
        return True

    def cleanup(self) -> None:
        """End the trial in good order."""
        self._trial.end()


def _start(job: Job, config: Mapping[str, Any]) -> _Replay | _Trial:
    if config.get("replay") is not None:
        return _Replay(config["replay"])
    return _Trial(job, int(config["number"]), dict(config["values"]))


class _Replay:
    """A trial that was stopped before the sweep was killed: its scores are told again, not run."""

    def __init__(self, scores: list[Any]) -> None:
        self._scores = list(scores)

    def next(self) -> dict[str, Any]:
        """One recorded score, at last the end."""
        if self._scores:
            rows, score = self._scores.pop(0)
            return {"rows": rows, "score": score, "replayed": True}
        return {"done": True, "end": {"state": "stopped"}}

    def end(self) -> None:
        """Nothing runs."""


class _Trial:
    """A run in a thread of its own, and the queue of what it tells."""

    def __init__(self, job: Job, number: int, values: Values) -> None:
        self._job, self._number, self._values = job, number, values
        self._told: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"trial {number}", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """Wait for news; changes of steps that came together are told together."""
        result: dict[str, Any] = {"steps": {}}
        while True:
            try:
                told = self._told.get(timeout=_BEAT)
            except queue.Empty:
                return result  # an actor does one thing at a time: only now it can be stopped
            result |= {name: value for name, value in told.items() if name != "steps"}
            result["steps"] |= told.get("steps", {})
            if "rows" in told or "done" in told or self._told.empty():
                return result

    def end(self) -> None:
        """Stop the run if it still goes, and wait until its steps are cancelled."""
        self._stop.set()
        self._thread.join(_CANCEL)

    def _work(self) -> None:
        try:
            end = self._run()
        except KeyboardInterrupt:
            end = {"state": "stopped"}
        except GoldcrestError as error:
            end = {"state": "failed", "error": error.message, "hint": error.hint}
        except Exception as error:  # noqa: BLE001 - one trial's fault must not end the sweep
            end = {"state": "failed", "error": f"{type(error).__name__}: {error}", "hint": None}
        objective = end.pop("objective", None)
        told = {"done": True, "end": end}
        self._told.put(told if objective is None else told | {"objective": objective})

    def _run(self) -> dict[str, Any]:
        job = self._job
        with relative_to(job.folder):
            config = job.space.configure(
                job.config_class, job.tree, self._values, where=f"trial {self._number}"
            )
        result = run(
            job.pipeline,
            config,
            store=Store.open(job.store_uri),
            profile=job.profile,
            listeners=[_Reporter(job.watch, self._told), ReportWriter()],
            run_id=job.run_id(self._number),
            stop=self._stop.is_set,
        )
        return _end(result, job.goal)


def _end(result: RunResult, goal: Goal) -> dict[str, Any]:
    """What the sweep keeps of a run that has ended."""
    if result.status != "succeeded":
        error = result.error
        return {
            "state": "failed",
            "step": error.step if error else None,
            "error": error.message if error else "the run failed",
            "hint": error.hint if error else None,
        }
    metrics = result.as_json()["metrics"]
    value = goal.value(metrics)
    end = {"state": "succeeded", "metrics": metrics, "metric": value, "seconds": result.seconds}
    return end if value is None else end | {"objective": goal.sign * value}


@dataclass
class _Reporter:
    """A listener of the run that puts what the sweep must know into the trial's queue."""

    watch: Watch
    told: queue.Queue[dict[str, Any]]
    rows: int = field(default=0)

    def on_event(self, event: Event) -> None:
        """Tell changes of steps and rows of the watched curve."""
        if isinstance(event, RunStarted):
            self.told.put({"total": len(event.plan.steps)})
        elif isinstance(event, StepLog):
            self._row(event.step, event.row)
        elif isinstance(event, StepChanged) and event.state != "waiting":
            if event.state == "cached" and event.path:
                self._replay(event.step, Path(event.path))
            self.told.put({"steps": {event.step: event.state}})

    def _row(self, step: str, row: Mapping[str, float], **more: Any) -> None:
        score = self.watch.score(step, row)
        if score is None:
            return
        at = self.rows + 1
        if len(self.watch.steps) == 1 and "epoch" in row:
            # A training that goes on from a checkpoint begins later, or tells an epoch again.
            at = int(row["epoch"]) + 1
        if at > self.rows:
            self.rows = at
            self.told.put({"rows": at, "score": score, **more})

    def _replay(self, step: str, artifact: Path) -> None:
        """The curve of a step that needed no work; `replayed`, so that it stops no trial."""
        if self.watch.steps and step not in self.watch.steps:
            return
        try:
            lines = (artifact / "log.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return  # most steps have no curve; a damaged one costs the curve
        for row in rows:
            self._row(step, row, replayed=True)

"""What Tune's trials report, as events of the sweep and as its results: a callback of Tune.

Runs in the driver. A trial is told of as a step of the run that the sweep is: waiting, running,
then ran, failed, or skipped where the scheduler stopped it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from goldcrest.cluster.events import (
    Event,
    Failure,
    StepChanged,
    StepLog,
    StepProgress,
    StepState,
)
from goldcrest.cluster.sweep_record import SweepRecord, TrialResult, TrialState
from goldcrest.cluster.sweep_trial import Goal, Job, numbers

_LISTED = 24  # metrics named where the wanted one is not among them
_TOLD: Mapping[TrialState, StepState] = {
    "succeeded": "ran",
    "failed": "failed",
    "stopped": "skipped",
    "interrupted": "skipped",
}


class Monitor(Callback):
    """Keeps the results of all trials and tells of them."""

    def __init__(
        self, job: Job, record: SweepRecord, notify: Callable[[Event], None], scheduler: str
    ) -> None:
        self.job, self.record, self.notify, self.scheduler = job, record, notify, scheduler
        self.trials: dict[int, TrialResult] = {}
        self.fault: Failure | None = None  # of the sweep itself; it ends then
        self.interrupted = False
        self._totals: dict[int, int] = {}
        self._started: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks; what is in this one never travels

    @property
    def ending(self) -> bool:
        """Whether no further trial should run."""
        return self.interrupted or self.fault is not None

    # ------------------------------------------------------------------------ told by Tune

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial begins, or begins again after its actor was lost."""
        known = self._begin(trial)
        self._change(known, "running", reason=_words(known.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """News of a trial."""
        known = self.trials[_point(trial)[0]]
        self._totals[known.number] = result.get("total", self._totals.get(known.number, 0))
        if result.get("steps"):
            done = {step for step, state in known.steps.items() if state == "ran"}
            known.steps |= {s: state for s, state in result["steps"].items() if s not in done}
            self._progress(known)
        if "score" in result:
            self._row(known, int(result["rows"]), float(result["score"]))
        if "end" in result:
            self._end(known, result["end"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial ended by itself, or was stopped by the scheduler."""
        known = self.trials.get(_point(trial)[0])
        if known is not None and known.state == "running" and not self.ending:
            self._end(known, {"state": "stopped"})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial's own process could not start, or was lost again and again."""
        known = self.trials.get(_point(trial)[0])
        if known is None:
            error = f"its process could not start: {_reason(trial)}"
            hint = "what the pipeline imports must be there on every node of the cluster"
            self._end(self._begin(trial), {"state": "failed", "error": error, "hint": hint})
        elif known.state == "running":
            error = f"its process was lost again and again: {_reason(trial)}"
            self._end(known, {"state": "failed", "error": error, "hint": "look at the head node"})

    def close(self) -> None:
        """Tune has ended: of the trials that end with the sweep it says no word."""
        for known in self.trials.values():
            if known.state == "running":
                self._end(known, {"state": "interrupted"})

    # ------------------------------------------------------------------- told to the listeners

    def _begin(self, trial: Any) -> TrialResult:
        number, values = _point(trial)
        new = TrialResult(number=number, config=values, run=self.job.run_id(number))
        known = self.trials.setdefault(number, new)
        self._started[number] = time.monotonic()
        if "replay" not in trial.config:
            self.record.note(known)
        return known

    def _progress(self, known: TrialResult) -> None:
        total = self._totals.get(known.number) or len(known.steps)
        states = list(known.steps.values())
        done = sum(state not in ("running", "waiting") for state in states)
        now = [step for step, state in known.steps.items() if state == "running"]
        self.notify(
            StepProgress(
                run_id=self.job.sweep,
                step=_name(known),
                share=min(1.0, done / total) if total else None,
                note=", ".join(now),
            )
        )

    def _row(self, known: TrialResult, rows: int, score: float) -> None:
        if known.scores and rows <= known.scores[-1][0]:
            return  # told before its actor was lost
        known.scores.append((rows, score))
        row = {"score": score}
        self.notify(StepLog(run_id=self.job.sweep, step=_name(known), index=rows - 1, row=row))

    def _end(self, known: TrialResult, end: Mapping[str, Any]) -> None:
        known.state = end["state"]
        known.metrics = dict(end.get("metrics") or {})
        known.metric = end.get("metric")
        known.seconds = end.get("seconds", time.monotonic() - self._started[known.number])
        if known.state == "failed":
            known.failure = Failure(
                step=end.get("step"), message=str(end["error"]), hint=end.get("hint")
            )
        if known.state == "succeeded" and known.metric is None:
            known.state = "failed"
            known.failure = _no_metric(self.job.goal, known.metrics)
            if self.fault is None and not any(t.metric is not None for t in self.trials.values()):
                self.fault = known.failure
        self.record.note(known)
        self._change(known, _TOLD[known.state], reason=self._why(known), failure=known.failure)

    def _why(self, known: TrialResult) -> str:
        if known.state == "stopped":
            return f"stopped by {self.scheduler} after row {known.rows}"
        if known.state == "interrupted":
            return "the sweep ended before"
        return known.failure.message if known.failure else _words(known.config)

    def _change(self, known: TrialResult, state: StepState, **facts: Any) -> None:
        goal = {} if known.metric is None else {self.job.goal.metric: known.metric}
        self.notify(
            StepChanged(
                run_id=self.job.sweep,
                step=_name(known),
                state=state,
                seconds=known.seconds if state != "running" else None,
                metrics=goal or known.metrics,
                manifest={"config": known.config, "metrics": known.metrics},
                **facts,
            )
        )


class Ending(Stopper):
    """Tells Tune to stop all trials once the sweep is to end."""

    def __init__(self, monitor: Monitor | None = None) -> None:
        self._monitor = monitor

    def __reduce__(self) -> tuple[Any, ...]:
        return (Ending, ())  # Tune saves its stopper; it is never read again

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is ended here."""
        return False

    def stop_all(self) -> bool:
        """Whether the sweep is to end now."""
        return self._monitor is not None and self._monitor.ending


def _point(trial: Any) -> tuple[int, dict[str, Any]]:
    return int(trial.config["number"]), dict(trial.config["values"])


def _reason(trial: Any) -> str:
    """The last line of what Tune wrote down of a trial's error."""
    file = Path(trial.error_file or "")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason is known"


def _name(known: TrialResult) -> str:
    return f"trial-{known.number:03d}"


def _words(values: Mapping[str, Any]) -> str:
    """A point for people: the last words of its fields are enough where they differ."""
    last = [path.rpartition(".")[2] for path in values]
    short = last if len(set(last)) == len(last) else list(values)
    return ", ".join(f"{name}={value}" for name, value in zip(short, values.values(), strict=True))


def _no_metric(goal: Goal, metrics: Mapping[str, Any]) -> Failure:
    """The sentence for a `--metric` that a finished run does not have."""
    import difflib

    known = list(numbers(metrics))
    near = difflib.get_close_matches(goal.metric, known, n=_LISTED, cutoff=0.5)
    listed = list(dict.fromkeys([*near, *known]))[:_LISTED]
    more = f", and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return Failure(
        step=None,
        message=f"a finished trial has no metric '{goal.metric}'",
        hint=f"its metrics are: {', '.join(listed) or 'none'}{more}",
    )

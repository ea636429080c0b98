"""What a sweep comes to, and its record in the store, from which a repeated command goes on.

<store>/runs/<sweep>/trials.jsonl   one line per change of a trial; the last line of each counts
                     events.jsonl   the sweep's events, in the form of a run's
                     sweep.json     what was asked: two different sweeps may not share a name
                     result.json    the stable JSON of `--json`
                     best.yaml      the best trial's config, ready for `goldcrest run --config`
                     report.html    the report
<store>/runs/<sweep>-007/           trial 7, a run like any other

The artifacts of finished trials lie in the store, so repeating such a trial costs a look. What the
store can't know is in `trials.jsonl`: which points a search proposed, and which trials were stopped
and with which scores. A line that a kill cut short costs that line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.events import Failure, stable_status
from goldcrest.cluster.json_text import json_text
from goldcrest.cluster.masking import mask_secrets
from goldcrest.cluster.report import write_text
from goldcrest.cluster.sweep_space import Space, Values

TrialState = Literal["running", "succeeded", "failed", "stopped", "interrupted"]
"""running -> succeeded | failed | stopped by the scheduler | interrupted with the sweep."""


@dataclass(kw_only=True)
class TrialResult:
    """One trial: its point, how it ended, what it measured."""

    number: int
    config: Values  # the swept fields by dotted path
    run: str  # the name of its run
    state: TrialState = "running"
    metric: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    scores: list[tuple[int, float]] = field(default_factory=list)  # (row, score): larger is better
    steps: dict[str, str] = field(default_factory=dict)  # step -> its state in this command
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """How far its watched curve has come."""
        return self.scores[-1][0] if self.scores else 0

    def as_json(self) -> dict[str, Any]:
        """The stable JSON of a trial."""
        return {
            "number": self.number,
            "config": dict(self.config),
            "metric": self.metric,
            "state": self.state,
            "run": self.run,
            "seconds": round(self.seconds, 3),
            "rows": self.rows,
            "error": self.failure.message if self.failure else None,
        }


@dataclass(kw_only=True)
class SweepResult:
    """What a sweep came to; `as_json` is the stable form that `--json FILE` writes."""

    sweep: str
    pipeline: str
    metric: str
    mode: str
    status: Literal["succeeded", "failed", "interrupted"]
    seconds: float
    trials: list[TrialResult]
    report: str | None = None
    best_config: str | None = None
    error: Failure | None = None

    @property
    def best(self) -> TrialResult | None:
        """The best finished trial, the first of equals."""
        done = [trial for trial in self.trials if trial.metric is not None]
        sign = 1.0 if self.mode == "max" else -1.0
        return max(done, key=lambda trial: sign * (trial.metric or 0.0), default=None)

    @property
    def executions(self) -> dict[str, int]:
        """How many steps of all trials this command ran, and how many it found done."""
        states = [state for trial in self.trials for state in trial.steps.values()]
        return {"ran": states.count("ran"), "cached": states.count("cached")}

    def as_json(self) -> dict[str, Any]:
        """The stable JSON of a sweep; its status is succeeded or failed, as that of a run."""
        best = self.best
        error = self.error and {
            "step": self.error.step,
            "message": self.error.message,
            "hint": self.error.hint,
        }
        return {
            "sweep": self.sweep,
            "pipeline": self.pipeline,
            "metric": self.metric,
            "mode": self.mode,
            "status": stable_status(self.status),
            "seconds": round(self.seconds, 3),
            "trials": [trial.as_json() for trial in self.trials],
            "best": best.as_json() if best else None,
            "executions": self.executions,
            "best_config": self.best_config,
            "report": self.report,
            "error": error,
        }


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A trial that the scheduler stopped in an earlier attempt."""

    values: Values
    scores: list[tuple[int, float]]


class SweepRecord:
    """Reads and writes a sweep's folder; a disk that refuses costs the record, not the sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trials = folder / "trials.jsonl"

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Note what is asked; InputError where the name belongs to another sweep."""
        path = self.folder / "sweep.json"
        earlier: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(earlier, dict) and earlier.get("asked", facts["asked"]) != facts["asked"]:
            raise InputError(
                f"'{self.folder.name}' is the name of another sweep",
                hint="choose another --name, or leave it out",
            )
        self.write("sweep.json", {**facts})

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace one JSON file of the record as a whole."""
        text = json_text(mask_secrets(value), indent=2, default=str)
        with contextlib.suppress(OSError):
            write_text(self.folder / name, text + "\n")

    def note(self, trial: TrialResult) -> None:
        """Append how a trial stands."""
        facts = mask_secrets({**trial.as_json(), "scores": trial.scores, "steps": trial.steps})
        with contextlib.suppress(OSError), self._trials.open("a", encoding="utf-8") as stream:
            stream.write(json_text(facts) + "\n")

    def ended(self) -> tuple[SweepResult, Space]:
        """The sweep as its last attempt left it, and its space.

        Raises InputError where the record can't be read, or no attempt has come to an end.
        """
        where = f"the record of the sweep {self.folder.name}"
        if not (self.folder / "result.json").is_file():
            raise InputError(
                f"{where} has no result yet", hint="repeat its command: it goes on where it was"
            )
        try:
            asked, facts = (
                json.loads((self.folder / name).read_text(encoding="utf-8"))
                for name in ("sweep.json", "result.json")
            )
            space = Space.parse(asked["space"], where=where)
            noted = self._latest()
            trials = [_trial({**noted.get(each["number"], {}), **each}) for each in facts["trials"]]
            names = ("sweep", "pipeline", "metric", "mode", "status", "seconds", "best_config")
            error = facts["error"] and Failure(**facts["error"])
            result = SweepResult(**{n: facts[n] for n in names}, trials=trials, error=error)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} can't be read: {error!r}") from error
        return result, space

    def earlier(self, space: Space) -> tuple[list[Values], dict[int, Replay]]:
        """The points of earlier attempts from number 0 on, and those that were stopped."""
        known: dict[int, dict[str, Any]] = {}
        for number, facts in self._latest().items():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known[number] = _checked(facts, space)
        points: list[Values] = []
        while len(points) in known:
            points.append(known[len(points)]["config"])
        stopped = {
            number: Replay(values=facts["config"], scores=facts["scores"])
            for number, facts in known.items()
            if facts["state"] == "stopped"
        }
        return points, stopped

    def _latest(self) -> dict[int, dict[str, Any]]:
        """What was noted last of each trial, by number."""
        latest: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            for line in self._trials.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    facts = json.loads(line)
                    latest[int(facts["number"])] = facts
        return latest


def _trial(facts: Mapping[str, Any]) -> TrialResult:
    """A trial from its JSON and what was noted of it while it ran."""
    names = ("number", "config", "run", "state", "metric", "seconds")
    return TrialResult(
        **{name: facts[name] for name in names},
        scores=[(int(row), float(score)) for row, score in facts.get("scores", ())],
        steps=dict(facts.get("steps", {})),
        failure=Failure(step=None, message=facts["error"]) if facts["error"] else None,
    )


def _checked(facts: dict[str, Any], space: Space) -> dict[str, Any]:
    """A line of the record, if it is a point of this space; else a ValueError or KeyError."""
    config = space.decode(space.encode(facts["config"]))
    scores = [(int(row), float(score)) for row, score in facts["scores"]]
    return {"config": config, "scores": scores, "state": str(facts["state"])}

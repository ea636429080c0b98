"""Sweeps on a real Ray with the real Tune: what runs, is shared, is stopped, is told.

`sweep_toys` leaves a file for every execution of a step; its error is worked out by hand:
(rate - 0.3)^2 + |depth - 2| + (0 if kind is plain else 0.5).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from goldcrest.cluster.config_file import load_config
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.events import Event, RunFinished, RunStarted, StepChanged, StepLog
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.store import Store
from goldcrest.cluster.sweep import SweepInterrupted, sweep
from goldcrest.cluster.sweep_plan import SweepOptions
from goldcrest.cluster.sweep_record import SweepResult
from goldcrest.cluster.sweep_space import Space
from goldcrest.cluster.tracking import Tracking
from tests.cluster import sweep_toys

METRIC = "verification.dense.eer"


class Lab:
    """A store, a folder of marks, and the events of the last sweep."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder / "store")
        self.marks = folder / "marks"
        self.marks.mkdir(exist_ok=True)
        self.events: list[Event] = []

    def sweep(
        self, space: dict[str, Any], *, listeners: tuple[Any, ...] = (), **given: Any
    ) -> SweepResult:
        learn = given.pop("learn", {})
        tree = {
            "prefix": {"marks": str(self.marks), "seconds": given.pop("seconds", 0.0)},
            "learn": {"marks": str(self.marks), **learn},
            "hub_token": "hush-hush",
        }
        name = given.pop("name", None)
        self.events.clear()
        return sweep(
            sweep_toys,
            tree,
            Space.parse(space),
            SweepOptions(**{"metric": METRIC, **given}),
            store=self.store,
            listeners=[self, *listeners],
            name=name,
        )

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def executed(self) -> Counter[str]:
        return Counter(path.name.split("-")[0] for path in self.marks.iterdir())

    def leases(self) -> list[str]:
        """Keys that a live process holds."""
        keys = [path.name for path in (self.store.root / "leases").iterdir()]
        return [key for key in keys if self.store.leases.held(key) is not None]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def free_cores() -> float:
    import ray

    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0.0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0.0)


GRID: dict[str, Any] = {
    "learn.rate": {"grid": [0.3, 0.5, 5.0]},
    "learn.depth": {"grid": [2, 3]},
}


def test_a_grid_whose_trials_start_at_once_shares_the_prefix(
    ray_cluster: None, lab: Lab, tmp_path: Path
) -> None:
    """Three trials at once on two cores, a first step that needs both, a rate that fails."""
    database = tmp_path / "mlflow" / "ml.db"
    warnings: list[str] = []
    tracking = Tracking(f"sqlite:///{database}", artifacts=tmp_path / "art", warn=warnings.append)
    with tracking:
        result = lab.sweep(
            GRID,
            search="grid",
            parallel=3,
            seconds=1.0,
            learn={"fail_above": 4.0},
            listeners=(tracking,),
        )
        tracking.close(wait=120)

    states = {tuple(t.config.values()): t.state for t in result.trials}
    assert states == {(r, d): "failed" if r == 5.0 else "succeeded"
                      for r in (0.3, 0.5, 5.0) for d in (2, 3)}  # fmt: skip
    failed = next(t for t in result.trials if t.state == "failed")
    assert failed.failure is not None
    assert (failed.failure.step, failed.failure.message) == ("learn", "the rate is too high")
    assert result.best is not None
    assert result.best.config == {"learn.rate": 0.3, "learn.depth": 2}
    assert result.best.metric == 0.0
    assert result.status == "succeeded"
    # prefix and second once in all; learn six times (two fail), measure four times.
    executed = lab.executed()
    assert (executed["prefix"], executed["second"]) == (1, 1)
    assert (
        executed["learn"] >= 6
    )  # Ray repeats a failing one whose worker it lost on a busy machine
    assert result.executions == {"ran": 1 + 1 + 4 + 4, "cached": 2 * 6 - 2}
    assert not lab.leases()
    assert free_cores() == 2

    _check_the_record(lab, result)
    _check_the_events(lab, result)
    assert warnings == []
    _check_mlflow(f"sqlite:///{database}", result)


def _check_the_record(lab: Lab, result: SweepResult) -> None:
    folder = lab.store.run_folder(result.sweep)
    assert json.loads((folder / "result.json").read_text()) == result.as_json()
    stable = result.as_json()
    assert {"trials", "best", "executions"} <= set(stable)
    assert {"config", "metric", "state"} <= set(stable["trials"][0])
    best = Path(str(result.best_config)).read_text()
    assert "hub_token" in best.splitlines()[2]  # a comment says that it is left out
    config = load_config(sweep_toys.Config, file=Path(str(result.best_config)))
    assert (config.learn.rate, config.learn.depth) == (0.3, 2)
    report = Path(str(result.report)).read_text()
    assert report.count('class="trial rank') == 4
    assert "told from 8 finished trials on; there are 4" in report
    assert f"../{result.trials[0].run}/report.html" in report
    assert "the rate is too high" in report
    for path in lab.store.root.rglob("*"):
        if path.is_file():
            assert b"hush-hush" not in path.read_bytes(), path
    assert not list(folder.glob("tune-*"))


def _check_the_events(lab: Lab, result: SweepResult) -> None:
    assert isinstance(lab.events[0], RunStarted)
    assert isinstance(lab.events[-1], RunFinished)
    assert lab.events[-1].result.metrics["best"] == {METRIC: 0.0}
    ends = {e.step: e.state for e in lab.events if isinstance(e, StepChanged)}
    assert Counter(ends.values()) == {"ran": 4, "failed": 2}
    rows = [e for e in lab.events if isinstance(e, StepLog) and e.step == "trial-000"]
    assert [round(-e.row["score"], 3) for e in rows] == [1.0, 0.5, 0.333, 0.25]


def _check_mlflow(uri: str, result: SweepResult) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("sweep_toys")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 6
    assert parent.info.run_name == result.sweep
    assert parent.data.metrics[f"best.{METRIC}"] == 0.0
    assert "hush" not in json.dumps(parent.data.params)
    child = next(run for run in children if run.info.run_name == "trial-000")
    assert child.data.params == {"learn.rate": "0.3", "learn.depth": "2"}
    assert child.data.metrics[METRIC] == 0.0
    assert len(client.get_metric_history(child.info.run_id, "score")) == 4
    assert Counter(run.info.status for run in children) == {"FINISHED": 4, "FAILED": 2}


@pytest.mark.slow  # that trials share what is in the store is tested above
def test_a_repeated_and_a_longer_sweep_find_everything(ray_cluster: None, lab: Lab) -> None:
    space = {"learn.rate": {"uniform": [0.1, 1.0]}}
    first = lab.sweep(space, trials=2)
    before = lab.executed()
    assert before == {"prefix": 1, "second": 1, "learn": 2, "measure": 2}
    longer = lab.sweep(space, trials=3)
    assert longer.sweep == first.sweep
    assert [t.config for t in longer.trials[:2]] == [t.config for t in first.trials]
    assert [t.metric for t in longer.trials[:2]] == [t.metric for t in first.trials]
    assert longer.executions == {"ran": 2, "cached": 10}
    assert lab.executed() - before == {"learn": 1, "measure": 1}
    with pytest.raises(InputError, match="is the name of another sweep"):
        lab.sweep(space, trials=1, seed=5, name=first.sweep)


def test_a_metric_that_is_not_there_ends_the_sweep_at_its_first_trial(
    ray_cluster: None, lab: Lab
) -> None:
    space = {"learn.rate": {"uniform": [0.1, 1.0]}}
    result = lab.sweep(space, trials=8, parallel=1, metric="verification.dense.err")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.message == "a finished trial has no metric 'verification.dense.err'"
    assert result.error.hint == "its metrics are: verification.dense.eer"
    assert result.best is None
    assert lab.executed()["measure"] <= 2  # the next one may have begun
    assert {trial.state for trial in result.trials[1:]} <= {"interrupted"}


@pytest.mark.slow
def test_asha_stops_the_worse_whose_steps_end(ray_cluster: None, lab: Lab) -> None:
    """Depths in rising order of error; after the first two only a better one may go on."""
    space = {"learn.depth": {"grid": [2, 3, 4, 5, 6]}}
    result = lab.sweep(
        space,
        search="grid",
        scheduler="asha",
        grace=1,
        reduction=2,
        parallel=1,
        learn={"epochs": 30, "seconds": 0.1},
    )
    states = [trial.state for trial in result.trials]
    assert states == ["succeeded", "stopped", "stopped", "stopped", "stopped"]
    assert result.best is not None
    assert result.best.config == {"learn.depth": 2}
    assert all(0 < trial.rows < 30 for trial in result.trials[1:])
    assert all(trial.metric is None for trial in result.trials[1:])
    assert lab.executed() == {"prefix": 1, "second": 1, "learn": 5, "measure": 1}
    assert not lab.leases()
    assert free_cores() == 2
    # Stopped is stopped: a repeated command runs none of them again.
    again = lab.sweep(
        space,
        search="grid",
        scheduler="asha",
        grace=1,
        reduction=2,
        parallel=1,
        learn={"epochs": 30, "seconds": 0.1},
    )
    assert [trial.state for trial in again.trials] == states
    assert [trial.scores for trial in again.trials] == [trial.scores for trial in result.trials]
    assert again.executions["ran"] == 0
    assert lab.executed()["learn"] == 5


@pytest.mark.slow
def test_asha_stops_trials_by_the_history_of_the_engine(ray_cluster: None, lab: Lab) -> None:
    """The first rate learns; of the others the losses stay where they began."""
    from tests.cluster import sweep_training

    result = sweep(
        sweep_training,
        {"learn": {"seconds": 1.0}},
        Space.parse({"learn.training.learning_rate": {"grid": [0.2, 1e-8, 1e-9]}}),
        SweepOptions(
            metric="training.loss",
            search="grid",
            scheduler="asha",
            grace=2,
            reduction=2,
            parallel=1,
        ),
        store=lab.store,
    )
    assert [trial.state for trial in result.trials] == ["succeeded", "stopped", "stopped"]
    best, *stopped = result.trials
    told = best.metrics["training"]
    assert best.rows == 20
    assert [-best.scores[0][1], -best.scores[-1][1]] == [told["first"], told["loss"]]
    assert told["loss"] < told["first"] / 2
    for trial in stopped:
        assert 2 <= trial.rows < 20
        losses = [-score for _, score in trial.scores]
        assert max(losses) - min(losses) < 0.01 < min(losses) - told["loss"]
    assert not lab.leases()
    assert free_cores() == 2


@pytest.mark.slow
def test_pbt_copies_the_best_by_the_history_of_the_engine(ray_cluster: None, lab: Lab) -> None:
    """Four rates are drawn, the last is stopped as the worst; then copies of the best are tried."""
    from tests.cluster import sweep_training

    path, seed = "learn.training.learning_rate", 9  # which draws the least rate last
    space = Space.parse({path: {"loguniform": [1e-6, 0.2]}})
    result = sweep(
        sweep_training,
        {"learn": {"seconds": 0.5}},
        space,
        SweepOptions(
            metric="training.loss", scheduler="pbt", grace=5, trials=5, parallel=1, seed=seed
        ),
        store=lab.store,
    )
    trials = result.trials
    drawn = trials[:4]
    assert [trial.config for trial in drawn] == space.random_points(4, seed)
    assert [trial.state for trial in drawn] == ["succeeded"] * 3 + ["stopped"]
    assert trials[3].rows == 5  # the first look
    assert trials[3].scores[-1][1] < min(trial.scores[4][1] for trial in drawn[:3])
    for trial in trials[:3]:
        told = trial.metrics["training"]
        assert trial.rows == 20
        assert [-trial.scores[0][1], -trial.scores[-1][1]] == [told["first"], told["loss"]]
    best = min(drawn[:3], key=lambda trial: trial.metrics["training"]["loss"])
    ratio = trials[4].config[path] / best.config[path]
    assert ratio == pytest.approx(0.8, rel=1e-3) or ratio == pytest.approx(1.2, rel=1e-3)
    assert result.best is not None
    assert result.best.metric <= best.metric
    assert not lab.leases()
    assert free_cores() == 2


def test_ctrl_c_ends_the_trials_in_good_order(ray_cluster: None, lab: Lab) -> None:
    class Impatient:
        def on_event(self, event: Event) -> None:
            if isinstance(event, StepLog) and event.index == 1:
                os.kill(os.getpid(), signal.SIGINT)

    space = {"learn.rate": {"grid": [0.3, 0.4, 0.5]}}
    learn = {"epochs": 200, "seconds": 0.2}
    with pytest.raises(SweepInterrupted) as stopped:
        lab.sweep(space, search="grid", parallel=1, learn=learn, listeners=(Impatient(),))
    result = stopped.value.result
    assert result.status == "interrupted"
    assert result.as_json()["status"] == "failed"
    assert "interrupted; the same command continues" in result.as_json()["error"]["message"]
    assert [trial.state for trial in result.trials] == ["interrupted"]
    assert lab.executed() == {"prefix": 1, "second": 1, "learn": 1}
    assert not lab.leases()
    assert free_cores() == 2
    record = json.loads((lab.store.run_folder(result.trials[0].run) / "run.json").read_text())
    assert record["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"search": "optuna"}, {"scheduler": "pbt", "grace": 2}])
def test_a_search_that_learns(ray_cluster: None, lab: Lab, how: dict[str, Any]) -> None:
    space = {"learn.rate": {"uniform": [0.1, 1.0]}, "learn.kind": {"choice": ["plain", {"a": 1}]}}
    result = lab.sweep(space, trials=6, parallel=2, **how)
    assert len(result.trials) == 6
    assert {trial.state for trial in result.trials} <= {"succeeded", "stopped"}
    assert result.best is not None
    executed = lab.executed()
    assert (executed["prefix"], executed["second"]) == (1, 1)
    again = lab.sweep(space, trials=6, parallel=2, **how)
    assert [t.config for t in again.trials] == [t.config for t in result.trials]
    assert again.executions["ran"] == 0


def test_what_no_node_can_run_is_refused_before_any_trial(ray_cluster: None, lab: Lab) -> None:
    profile = Profile.model_validate({"steps": {"learn": {"gpus": 1}}})
    with pytest.raises(InputError, match="'learn' asks for 1 GPUs"):
        sweep(
            sweep_toys,
            {},
            Space.parse(GRID),
            SweepOptions(metric=METRIC, search="grid"),
            store=lab.store,
            profile=profile,
        )
    assert not lab.executed()


def test_a_fault_of_tune_is_the_end_of_the_sweep_too(
    ray_cluster: None, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune breaks down once a trial has begun: record, report and listeners hear of the end."""
    from ray import tune

    def begin_and_break(tuner: Any) -> None:
        (monitor,) = tuner._local_tuner.get_run_config().callbacks
        trial = SimpleNamespace(config={"number": 0, "values": {"learn.rate": 0.3}})
        monitor.on_trial_start(0, [trial], trial)
        raise RuntimeError("no trial runner")

    monkeypatch.setattr(tune.Tuner, "fit", begin_and_break)
    with pytest.raises(RuntimeError, match="no trial runner"):
        lab.sweep(GRID, search="grid", name="broken")
    folder = lab.store.run_folder("broken")
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert "RuntimeError: no trial runner" in result["error"]["message"]
    assert [trial["state"] for trial in result["trials"]] == ["interrupted"]
    assert "no trial runner" in (folder / "report.html").read_text()
    assert isinstance(lab.events[-1], RunFinished)
    assert lab.events[-1].result.status == "failed"
    assert not list(folder.glob("tune-*"))


@pytest.mark.slow
def test_two_commands_of_one_sweep_do_the_work_once(ray_cluster: None, lab: Lab) -> None:
    space = {"learn.rate": {"grid": [0.2, 0.4]}}
    other = Lab(lab.marks.parent)
    results: list[SweepResult] = []

    def one(which: Lab) -> None:
        results.append(which.sweep(space, search="grid", parallel=2))

    thread = threading.Thread(target=one, args=[other])
    thread.start()
    one(lab)
    thread.join(timeout=200)
    assert len(results) == 2
    assert lab.executed() == {"prefix": 1, "second": 1, "learn": 2, "measure": 2}
    assert sorted(r.executions["ran"] for r in results) == [0, 6]


def test_a_trial_that_can_not_start_says_why(
    ray_cluster: None, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's module is on the driver's path only."""
    (tmp_path / "driver_s_own.py").write_text(
        "from tests.cluster import sweep_toys\n"
        "class Config(sweep_toys.Config): pass\n"
        "build = sweep_toys.build\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("goldcrest.cluster.sweep._LOST", 0)
    result = sweep(
        importlib.import_module("driver_s_own"),
        {},
        Space.parse({"learn.rate": {"grid": [0.3]}}),
        SweepOptions(metric=METRIC, search="grid"),
        store=lab.store,
    )
    (trial,) = result.trials
    assert (result.status, trial.state) == ("failed", "failed")
    assert result.error == trial.failure
    assert trial.failure is not None
    assert trial.failure.message.endswith(
        "could not start: ModuleNotFoundError: No module named 'driver_s_own'"
    )

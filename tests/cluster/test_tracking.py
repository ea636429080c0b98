"""Tracking with MLflow: what it writes, and that it never fails or delays a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster import tracking as tracking_module
from goldcrest.cluster.events import (
    Failure,
    RunFinished,
    RunResult,
    RunStarted,
    StepChanged,
    StepLog,
)
from goldcrest.cluster.plan import Plan
from goldcrest.cluster.tracking import Tracking, default_tracking_uri, flat_metrics
from goldcrest.cluster.tracking_writer import Inbox, Writer, open_client, serve


def started(folder: Path, **config: Any) -> RunStarted:
    plan = Plan(pipeline="garden", steps=())
    return RunStarted(run_id="r1", pipeline="garden", plan=plan, config=config, folder=folder)


def changed(step: str, state: Any, **facts: Any) -> StepChanged:
    return StepChanged(run_id="r1", step=step, state=state, **facts)


def finished(report: Path | None = None, **facts: Any) -> RunFinished:
    result = RunResult(
        run="r1",
        pipeline="garden",
        status="succeeded",
        seconds=1.0,
        steps=[],
        metrics={"verification": {"dense": {"eer": 0.1, "min_dcf_0.01": 0.5}}},
        report=str(report) if report else None,
    )
    for name, value in facts.items():
        setattr(result, name, value)
    return RunFinished(run_id="r1", result=result)


class Recorder:
    """A tracking whose writer is a small script that copies its input to a file."""

    def __init__(self, folder: Path, script: str, **options: Any) -> None:
        self.warnings: list[str] = []
        self.copy = folder / "copy.jsonl"
        code = f"copy = {str(self.copy)!r}\n{script}"
        self.tracking = Tracking(
            "sqlite:///nowhere.db",
            artifacts=folder / "artifacts",
            warn=self.warnings.append,
            command=(sys.executable, "-c", code),
            **options,
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.copy.read_text().splitlines()]


def end(child: subprocess.Popen[str]) -> None:
    """End a writer and the pipe to it."""
    child.kill()
    child.wait()
    with contextlib.suppress(BrokenPipeError):
        assert child.stdin is not None
        child.stdin.close()


COPY = "import sys\nwith open(copy, 'w') as f:\n    f.write(sys.stdin.read())\n"


def test_the_writer_gets_every_event_in_order_without_secrets(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, COPY)
    with recorder.tracking as tracking:
        tracking.on_event(started(tmp_path, hub_token="hush", rate=0.1))
        tracking.on_event(changed("a", "waiting"))
        tracking.on_event(changed("a", "running", place="s3://k:hush@b"))
        tracking.on_event(StepLog(run_id="r1", step="a", index=0, row={"loss": 1.0}))
        manifest = {
            "config": {"password": "hush"},
            "files": {"bundle.json": {}},
            "metrics": {"x": 1},
        }
        tracking.on_event(changed("a", "ran", manifest=manifest, reason="token=hush"))
        tracking.on_event(finished())
        tracking.close(wait=20)
    kinds = [(line["event"], line.get("state")) for line in recorder.lines()]
    assert kinds == [
        ("RunStarted", None),
        ("StepChanged", "running"),
        ("StepLog", None),
        ("StepChanged", "ran"),
        ("RunFinished", None),
    ]
    assert "hush" not in recorder.copy.read_text()
    assert recorder.warnings == []


@pytest.mark.parametrize(("always", "runs"), [(False, False), (True, True)])
def test_a_cached_run_is_tracked_only_when_asked(tmp_path: Path, always: bool, runs: bool) -> None:
    recorder = Recorder(tmp_path, COPY, always=always)
    with recorder.tracking as tracking:
        tracking.on_event(started(tmp_path))
        tracking.on_event(changed("a", "cached"))
        tracking.on_event(finished())
        tracking.close(wait=20)
    assert recorder.copy.exists() is runs


def test_a_writer_that_fails_is_one_warning_with_its_last_words(tmp_path: Path) -> None:
    script = "import sys\nprint('no server at http://u:hush@h/', file=sys.stderr)\nsys.exit(1)"
    recorder = Recorder(tmp_path, script)
    recorder.tracking.on_event(started(tmp_path))
    recorder.tracking.on_event(changed("a", "running"))
    recorder.tracking.close(wait=20)
    (warning,) = recorder.warnings
    assert "no server at http://***@h/" in warning
    assert "tracking.log" in warning


def test_a_writer_that_cannot_start_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracking = Tracking(
        "sqlite:///x.db", artifacts=tmp_path, warn=warnings.append, command=("/nonexistent/python",)
    )
    tracking.on_event(started(tmp_path))
    tracking.on_event(changed("a", "running"))
    tracking.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("tracking is off for this run")


def test_a_writer_that_never_reads_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe holds 64 KiB; far more goes into the queue, what does not fit is counted."""
    recorder = Recorder(tmp_path, "import time\ntime.sleep(60)")
    tracking = recorder.tracking
    tracking._queue.maxsize = 50  # the bound itself is under test, not its size
    monkeypatch.setattr(tracking_module, "HANDOVER", 0.2)
    tracking.on_event(started(tmp_path))
    tracking.on_event(changed("a", "running"))
    child = tracking._child
    assert child is not None
    row = {f"m{i}": float(i) for i in range(2000)}
    begun = time.monotonic()
    for index in range(100):
        tracking.on_event(StepLog(run_id="r1", step="a", index=index, row=row))
    tracking.close(wait=0.2)
    assert time.monotonic() - begun < 20  # not the writer's 60 s
    assert tracking._dropped > 0
    end(child)


def test_the_wait_at_the_end_is_bounded_by_the_length_of_the_run(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "import sys, time\nsys.stdin.read()\ntime.sleep(60)")
    recorder.tracking.on_event(started(tmp_path))
    recorder.tracking.on_event(changed("a", "running"))
    child = recorder.tracking._child
    assert child is not None
    begun = time.monotonic()
    recorder.tracking.close()
    assert time.monotonic() - begun < 20
    assert recorder.warnings == []
    end(child)


def test_metrics_are_flat_and_finite() -> None:
    values = {"a": {"b": 1, "c": "text", "d": [1, 2]}, "e": float("nan"), "f": True}
    assert flat_metrics(values) == {"a.b": 1.0, "f": 1.0}


def test_the_default_database_lies_in_the_store(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path / "runs")
    assert uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"


# ------------------------------------------------------------------- the writer, with real MLflow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One SQLite database for all tests: its creation takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    open_client(uri, folder / "artifacts")
    yield uri, folder / "artifacts"


def messages(folder: Path, feed: Callable[[Tracking], None]) -> list[dict[str, Any]]:
    """What the driver would send for the events that `feed` gives to a tracking."""
    recorder = Recorder(folder, COPY)
    feed(recorder.tracking)
    recorder.tracking.close(wait=30)
    return recorder.lines()


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_runs_nested_steps_curves_params_and_files(
    tmp_path: Path, database: tuple[str, Path]
) -> None:
    uri, artifacts = database
    bundle, plots = tmp_path / "bundle", tmp_path / "plots"
    (plots / "figures").mkdir(parents=True)
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}")
    (plots / "figures" / "det.png").write_bytes(b"png")
    (tmp_path / "report.html").write_text("<html>")
    made = {"config": {"rate": 0.1}, "measurements": {"rtf": 0.5}}

    def feed(tracking: Tracking) -> None:
        tracking.on_event(started(tmp_path, grow={"rate": 0.1}, seed=3))
        tracking.on_event(changed("old", "cached", reason="made before", metrics={"n": 4}))
        tracking.on_event(changed("grow", "running", place="node7"))
        for epoch in range(3):
            row = {"epoch": float(epoch), "loss": 1.0 / (1 + epoch), "bad name!": 1.0}
            tracking.on_event(StepLog(run_id="r1", step="grow", index=epoch, row=row))
        manifest = {**made, "files": {"bundle.json": {}}}
        tracking.on_event(
            changed("grow", "ran", path=str(bundle), manifest=manifest, metrics={"a": {"b": 2}})
        )
        manifest = {**made, "files": {"figures/det.png": {}, "table.parquet": {}}}
        tracking.on_event(changed("plot", "ran", path=str(plots), manifest=manifest))
        failure = Failure(step="bad", message="no water")
        tracking.on_event(changed("bad", "failed", failure=failure))
        tracking.on_event(changed("late", "skipped", reason="upstream `bad` failed"))
        tracking.on_event(finished(tmp_path / "report.html"))

    client = open_client(uri, artifacts)
    writer = Writer(client, artifacts)
    for message in messages(tmp_path, feed):
        writer.take(message)
    experiment = client.get_experiment_by_name("garden")
    assert experiment is not None
    assert experiment.artifact_location.startswith(artifacts.as_uri())
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"r1", "old", "grow", "plot", "bad", "late"}
    top = runs["r1"]
    assert top.info.status == "FINISHED"
    assert top.data.params == {"grow.rate": "0.1", "seed": "3"}
    assert top.data.metrics == {
        "verification.dense.eer": 0.1,
        "verification.dense.min_dcf_0.01": 0.5,
    }
    for step in set(runs) - {"r1"}:
        assert runs[step].data.tags["mlflow.parentRunId"] == top.info.run_id
    grow = runs["grow"]
    assert grow.data.params == {"rate": "0.1"}
    assert grow.data.metrics["a.b"] == 2.0
    assert grow.data.metrics["measurements.rtf"] == 0.5
    assert grow.data.metrics["bad name_"] == 1.0
    history = client.get_metric_history(grow.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    listed = {
        name: [f.path for f in client.list_artifacts(runs[name].info.run_id)] for name in runs
    }
    assert listed["r1"] == ["report.html"]
    assert listed["grow"] == ["bundle"]
    assert listed["plot"] == ["figures"]
    assert runs["bad"].info.status == "FAILED"
    assert runs["bad"].data.tags["goldcrest.reason"] == "no water"
    assert runs["late"].info.status == "KILLED"
    assert runs["old"].data.tags["goldcrest.state"] == "cached"


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_a_driver_that_dies_leaves_a_killed_run(tmp_path: Path, database: tuple[str, Path]) -> None:
    uri, artifacts = database
    client = open_client(uri, artifacts)
    reading, writing = os.pipe()
    lines = [
        {"event": "RunStarted", "time": 1.0, "run_id": "dead", "pipeline": "killed"}
        | {"config": {}, "folder": "x"},
        {"event": "StepChanged", "time": 2.0, "step": "grow", "state": "running", "place": ""},
        {"event": "StepLog", "time": 3.0, "step": "grow", "index": 0, "row": {"loss": 2.0}},
    ]
    os.write(
        writing, "".join(json.dumps(line) + "\n" for line in lines).encode() + b'{"event": "St'
    )
    os.close(writing)
    assert serve(Inbox(reading), Writer(client, artifacts)) == 0
    os.close(reading)
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert any(run.data.metrics == {"loss": 2.0} for run in runs)


class Broken(Writer):
    """A writer whose server is down."""

    def __init__(self) -> None:
        self.calls = 0

    def take(self, event: Any) -> None:
        self.calls += 1
        raise ConnectionError("the server is down")

    def flush(self) -> None:
        return None

    def abandon(self) -> None:
        return None


def test_a_broken_server_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    reading, writing = os.pipe()
    os.write(writing, b'{"event": "x"}\n' * 50)
    os.close(writing)
    broken = Broken()
    assert serve(Inbox(reading), broken) == 3
    assert broken.calls == 3


def test_the_driver_does_not_import_mlflow() -> None:
    code = (
        "import sys, goldcrest.cluster.tracking, goldcrest.cluster.report\n"
        "print([m for m in ('mlflow', 'torch', 'matplotlib', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wait_is_between_its_limits() -> None:
    assert 0 < tracking_module.LEAST_WAIT < tracking_module.MOST_WAIT

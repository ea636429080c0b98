"""The one writer of MLflow: reads a run's events as JSON lines from its input until that closes.

One MLflow run per pipeline run, one nested run per step; configs become parameters, curves and
results become metrics, figures, the report and bundles become artifacts. Started by
`goldcrest.cluster.tracking` as `python -m goldcrest.cluster.tracking_writer ARTIFACTS`, with the
tracking URI in `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.config_file import flatten
from goldcrest.cluster.masking import mask_text
from goldcrest.cluster.tracking import flat_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

BATCH = 500
"""Most metric values in one call (the server's limit is 1,000)."""
IDLE = 0.5
"""Seconds without news after which the curves that wait are sent."""
MAX_FAILURES = 3
"""Failed calls in a row after which the writer gives up."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. /:]")


class Writer:
    """Turns events into calls of an `MlflowClient`."""

    def __init__(self, client: MlflowClient, artifacts: Path) -> None:
        self._client = client
        self._artifacts = artifacts
        self._experiment = ""
        self._run: Run | None = None
        self._steps: dict[str, str] = {}
        self._waiting: dict[str, list[Metric]] = {}
        self._finished = False

    def take(self, event: Mapping[str, Any]) -> None:
        """Write one event (metrics of curves wait for `flush`)."""
        kind = event["event"]
        if kind == "RunStarted":
            self._start_run(event)
        elif self._run is None:
            return
        elif kind == "StepLog":
            self._curve(event)
        elif kind == "StepChanged":
            self._step(event)
        elif kind == "RunFinished":
            self._finish_run(event)

    def flush(self) -> None:
        """Send the curve values that are waiting, in few calls."""
        waiting, self._waiting = self._waiting, {}
        for run_id, metrics in waiting.items():
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def abandon(self) -> None:
        """The driver went away without a last word: its run and open steps were killed."""
        if self._run is None or self._finished:
            return
        for run_id in self._steps.values():
            if self._client.get_run(run_id).info.status == "RUNNING":
                self._client.set_terminated(run_id, "KILLED")
        self._client.set_terminated(self._run.info.run_id, "KILLED")

    def _start_run(self, event: Mapping[str, Any]) -> None:
        self._experiment = self._find_experiment(event["pipeline"])
        self._run = self._client.create_run(
            self._experiment,
            start_time=_milliseconds(event["time"]),
            run_name=event["run_id"],
            tags={
                "goldcrest.run": event["run_id"],
                "goldcrest.pipeline": event["pipeline"],
                "goldcrest.folder": event["folder"],
            },
        )
        self._params(self._run.info.run_id, event["config"])

    def _find_experiment(self, name: str) -> str:
        """The experiment of this pipeline; a new one keeps its files beside a local database."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = self._client.tracking_uri.startswith("sqlite:")
        place = (self._artifacts / name).as_uri() if local else None
        return str(self._client.create_experiment(name, artifact_location=place))

    def _params(self, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [
            Param(_name(field), str(value)[:6000])
            for field, value in flatten(dict(config)).items()
            if field
        ]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])

    def _step_run(self, event: Mapping[str, Any]) -> str:
        """The nested run of a step, created when it is first heard of."""
        assert self._run is not None
        step = event["step"]
        if step not in self._steps:
            run = self._client.create_run(
                self._experiment,
                start_time=_milliseconds(event["time"]),
                run_name=step,
                tags={
                    "mlflow.parentRunId": self._run.info.run_id,
                    "goldcrest.step": step,
                    "goldcrest.run": self._run.info.run_name,
                },
            )
            self._steps[step] = run.info.run_id
        return self._steps[step]

    def _curve(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        row = dict(event["row"])
        step = int(row.pop("epoch", event["index"]))
        stamp = _milliseconds(event["time"])
        waiting = self._waiting.setdefault(self._step_run(event), [])
        waiting += [Metric(_name(n), value, stamp, step) for n, value in flat_metrics(row).items()]

    def _step(self, event: Mapping[str, Any]) -> None:
        run_id = self._step_run(event)
        state = event["state"]
        self._client.set_tag(run_id, "goldcrest.state", state)
        if state == "running":
            self._client.set_tag(run_id, "goldcrest.place", event["place"])
            return
        self.flush()
        self._client.set_tag(run_id, "goldcrest.reason", event["failure"] or event["reason"])
        self._client.set_tag(run_id, "goldcrest.key", event["key"])
        self._params(run_id, event["config"])
        numbers = {**event["metrics"], "measurements": event["measurements"]}
        self._metrics(run_id, numbers, event["time"])
        if state == "ran" and event["path"]:
            self._files(run_id, Path(event["path"]), event["files"])
        status = {"failed": "FAILED", "skipped": "KILLED"}.get(state, "FINISHED")
        self._client.set_terminated(run_id, status, _milliseconds(event["time"]))

    def _metrics(self, run_id: str, values: Mapping[str, Any], when: float) -> None:
        from mlflow.entities import Metric

        stamp = _milliseconds(when)
        metrics = [Metric(_name(n), value, stamp, 0) for n, value in flat_metrics(values).items()]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _files(self, run_id: str, folder: Path, files: Sequence[str]) -> None:
        """Figures always; everything where the artifact is a bundle."""
        if "bundle.json" in files:
            self._client.log_artifacts(run_id, str(folder), artifact_path="bundle")
            return
        for name in files:
            if name.startswith("figures/"):
                self._client.log_artifact(run_id, str(folder / name), artifact_path="figures")

    def _finish_run(self, event: Mapping[str, Any]) -> None:
        assert self._run is not None
        self.flush()
        run_id, result = self._run.info.run_id, event["result"]
        self._metrics(run_id, result["metrics"], event["time"])
        report = result.get("report")
        if report and Path(report).is_file():
            self._client.log_artifact(run_id, report)
        if result.get("error"):
            self._client.set_tag(run_id, "goldcrest.error", mask_text(result["error"]["message"]))
        status = {"succeeded": "FINISHED", "failed": "FAILED"}.get(result["status"], "KILLED")
        self._client.set_terminated(run_id, status, _milliseconds(event["time"]))
        self._finished = True


def _name(text: str) -> str:
    return _NOT_IN_NAMES.sub("_", text)[:250]


def _milliseconds(seconds: float) -> int:
    return int(1000 * seconds)


@contextlib.contextmanager
def database_lock(folder: Path) -> Iterator[None]:
    """One process at a time may create or migrate the database in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_client(uri: str, artifacts: Path) -> MlflowClient:
    """A client of `uri`; a local database is created first, by one process."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri)
    with database_lock(artifacts.parent):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


class Inbox:
    """The lines of a file descriptor, read by a thread of its own from the first moment on.

    The driver may be gone before MLflow is even imported; what it had to say is safe here by then.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        pending = b""
        while block := os.read(self._stream, 1 << 16):
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def __iter__(self) -> Iterator[bytes]:
        """Lines until the stream ends; an empty one whenever none has come for half a second."""
        while True:
            try:
                line = self._lines.get(timeout=IDLE)
            except queue.Empty:
                line = b""
            if line is None:
                return
            yield line


def serve(inbox: Inbox, writer: Writer) -> int:
    """Write every event that comes in; returns how many calls failed.

    After `MAX_FAILURES` failures in a row the server counts as gone and is asked no more.
    """
    failures = in_a_row = 0
    for line in inbox:
        try:
            if line:
                writer.take(json.loads(line))
            else:
                writer.flush()
            in_a_row = 0
        except Exception as error:  # noqa: BLE001 - a broken server must not end the others' writing
            failures += 1
            in_a_row += 1
            _say(error)
        if in_a_row >= MAX_FAILURES:
            return failures
    try:
        writer.flush()
        writer.abandon()
    except Exception as error:  # noqa: BLE001 - as above
        failures += 1
        _say(error)
    return failures


def _say(error: Exception) -> None:
    stamp = time.strftime("%H:%M:%S")
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    sys.stderr.write(f"{stamp} {type(error).__name__}: {mask_text(first)[:500]}\n")
    sys.stderr.flush()


def main() -> int:
    """Read events from the standard input; the exit code says whether all were written."""
    os.nice(10)  # the run comes first
    artifacts = Path(sys.argv[1])
    inbox = Inbox(sys.stdin.fileno())
    try:
        client = open_client(os.environ["MLFLOW_TRACKING_URI"], artifacts)
    except Exception as error:  # noqa: BLE001 - any reason ends in the log, never in the run
        _say(error)
        return 1
    return 1 if serve(inbox, Writer(client, artifacts)) else 0


if __name__ == "__main__":
    sys.exit(main())

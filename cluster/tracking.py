"""Tracking a run with MLflow without ever failing or delaying it.

The driver only puts plain values into a bounded queue. A child process, the one writer
(`goldcrest.cluster.tracking_writer`), reads them from a pipe and talks to MLflow: its import, the
first creation of a database (6 s) and a slow server cost the run nothing, and should the driver be
killed, the pipe closes and the writer marks the MLflow run as killed. Where no step has to run,
no writer is started at all, unless that is asked for.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from goldcrest.cluster.events import Event, RunFinished, RunStarted, StepChanged, StepLog
from goldcrest.cluster.masking import mask_secrets, mask_text

QUEUE_SIZE = 20_000
"""Most events waiting for the writer; rows of curves beyond that are dropped and counted."""
HANDOVER = 5.0
"""Longest wait in seconds until the writer has taken over all events; usually milliseconds."""
LEAST_WAIT, MOST_WAIT = 0.5, 30.0
"""At the end of a run the driver waits a tenth of the run's time for the writer, within these."""


def default_tracking_uri(runs_folder: Path) -> str:
    """The SQLite database beside the run records of a store."""
    return f"sqlite:///{(runs_folder.parent / 'mlflow' / 'mlflow.db').absolute()}"


class Tracking:
    """A listener that hands a run to MLflow. A context manager: leaving it ends the writer.

    `uri` is any MLflow tracking URI; `folder` (the run's folder) takes the writer's log;
    `artifacts` is where a local database keeps its files; `always` also tracks runs in which every
    step is cached; `warn` is told, in one sentence, of anything that could not be tracked.
    """

    def __init__(
        self,
        uri: str,
        *,
        artifacts: Path,
        warn: Callable[[str], None],
        always: bool = False,
        command: tuple[str, ...] = (sys.executable, "-m", "goldcrest.cluster.tracking_writer"),
    ) -> None:
        self.uri = uri
        self._artifacts = artifacts
        self._warn = warn
        self._always = always
        self._command = command
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_SIZE)
        self._child: subprocess.Popen[str] | None = None
        self._feeder: threading.Thread | None = None
        self._log: Path | None = None
        self._started = time.monotonic()
        self._dropped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_event(self, event: Event) -> None:
        """Queue what MLflow should know; start the writer at the first step that really runs."""
        if isinstance(event, RunStarted):
            self._log = event.folder / "tracking.log"
        runs = isinstance(event, StepChanged) and event.state in ("running", "ran", "failed")
        message = self._message(event)
        if message is not None:
            text = json.dumps(mask_secrets(message), default=str)
            try:
                self._queue.put_nowait(text)
            except queue.Full:
                self._dropped += 1
        if self._child is None and (runs or self._always):
            self._start()

    def _message(self, event: Event) -> dict[str, Any] | None:
        """The part of an event that is tracked, None for the rest."""
        if isinstance(event, RunStarted):
            return {
                "event": "RunStarted",
                "time": event.time,
                "run_id": event.run_id,
                "pipeline": event.pipeline,
                "config": event.config,
                "folder": str(event.folder),
            }
        if isinstance(event, StepChanged) and event.state != "waiting":
            manifest = event.manifest or {}
            return {
                "event": "StepChanged",
                "time": event.time,
                "step": event.step,
                "state": event.state,
                "reason": event.reason,
                "place": event.place,
                "seconds": event.seconds,
                "key": event.key,
                "path": event.path,
                "metrics": event.metrics or manifest.get("metrics", {}),
                "measurements": manifest.get("measurements", {}),
                "config": manifest.get("config", {}),
                "files": sorted(manifest.get("files", {})),
                "failure": event.failure.message if event.failure else None,
            }
        if isinstance(event, StepLog):
            row = dict(event.row)
            return {
                "event": "StepLog",
                "time": event.time,
                "step": event.step,
                "index": event.index,
                "row": row,
            }
        if isinstance(event, RunFinished):
            return {"event": "RunFinished", "time": event.time, "result": event.result.as_json()}
        return None

    def _start(self) -> None:
        environment = {
            **os.environ,
            # By environment, not by argument: a URI may carry a password, arguments are public.
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "OMP_NUM_THREADS": "1",
        }
        try:
            with (self._log or Path(os.devnull)).open("a", encoding="utf-8") as log:
                self._child = subprocess.Popen(
                    [*self._command, str(self._artifacts.absolute())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C for the driver lets the writer finish
                )
        except OSError as error:
            self._warn(f"tracking is off for this run: {error}")
            self._always = False
            self._child = None
            return
        self._feeder = threading.Thread(
            target=self._feed, args=[self._child.stdin], name="tracking", daemon=True
        )
        self._feeder.start()

    def _feed(self, pipe: IO[str]) -> None:
        """Pass the queue on to the writer; this thread is the one that may have to wait."""
        try:
            while (text := self._queue.get()) is not None:
                pipe.write(text + "\n")
                pipe.flush()
            pipe.close()
        except OSError:
            return  # the writer has gone; `close` reads in its log why

    def close(self, wait: float | None = None) -> None:
        """End the stream and give the writer a moment; what it has not written goes on behind.

        `wait` is the longest wait in seconds, by default a tenth of the run's time so far.
        """
        child, feeder = self._child, self._feeder
        self._child = self._feeder = None
        if child is None or feeder is None:
            return
        taken = time.monotonic() - self._started
        wait = min(max(taken / 10, LEAST_WAIT), MOST_WAIT) if wait is None else wait
        try:
            self._queue.put(None, timeout=HANDOVER)
        except queue.Full:
            child.terminate()
        feeder.join(HANDOVER)  # the writer reads at once, whatever MLflow is doing
        try:
            code = child.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            child.returncode = 0  # left to itself on purpose: no warning when it is collected
            return
        if code != 0:
            self._warn(f"tracking with MLflow failed: {self._last_words(code)}")
        if self._dropped:
            self._warn(f"tracking was too slow: {self._dropped} events were left out")

    def _last_words(self, code: int) -> str:
        lines: list[str] = []
        if self._log is not None and self._log.is_file():
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        where = f" (see {self._log})" if self._log is not None else ""
        return mask_text(said[-1] if said else f"the writer ended with code {code}") + where


def flat_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Nested metrics as `{"a.b": number}`, leaving out whatever is no finite number."""
    import math

    from goldcrest.cluster.config_file import flatten

    return {
        name: float(value)
        for name, value in flatten(dict(values)).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }

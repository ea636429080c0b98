"""Prometheus metrics of an endpoint, the same from whichever replica is asked.

Replicas are processes: prometheus_client's multi-process mode lets each write its values to a file
of its own in one folder, and any of them answers for all. It reads the folder from an environment
variable, when it is first imported; so that variable is part of the replica's `runtime_env`.
"""

from __future__ import annotations

import os
from pathlib import Path

import prometheus_client
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RequestMetrics:
    """Counts and durations of requests; the observer of a `Gate`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Of a dead replica that had our id: its requests are not ours.
            Path(folder, f"gauge_livesum_{os.getpid()}.db").unlink(missing_ok=True)
        self._requests = Counter(
            "goldcrest_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "goldcrest_request_seconds",
            "Time from the request's header to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._inside = Gauge(
            "goldcrest_requests_in_progress",
            "Requests that are being answered",
            registry=self.registry,
            multiprocess_mode="livesum",
        )

    def began(self) -> None:
        """A request was let in."""
        self._inside.inc()

    def ended(self) -> None:
        """A request that was let in is done."""
        self._inside.dec()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """The metrics of all replicas on this node, in Prometheus' text format."""
        if FOLDER_VARIABLE not in os.environ:
            return prometheus_client.generate_latest(self.registry)
        _forget_dead(Path(os.environ[FOLDER_VARIABLE]))
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return prometheus_client.generate_latest(together)


def _forget_dead(folder: Path) -> None:
    """Drop the gauges of replicas that were killed: requests in progress died with them."""
    for path in folder.glob("gauge_livesum_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)

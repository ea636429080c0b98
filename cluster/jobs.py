"""Jobs on a Ray cluster: send the working tree, follow what happens, take the exit code home.

A thin layer over Ray's Jobs API (HTTP, on the dashboard's port) with three things it lacks: the
package is ours (job_package.py), logs are followed across a lost connection without repeating or
losing a line, and a job's end is its own exit code, where `ray job submit` knows only 0 and 1.

Authentication is Ray's: a bearer token from `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or
`~/.ray/auth_token` (ray_token.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.job_package import Package, write_zip
from goldcrest.cluster.masking import mask_command, mask_text
from goldcrest.cluster.ray_token import use_token_if_there

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOPPED = 130
"""Exit code of a job that was stopped: as after Ctrl-C."""
_FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL = 0.5  # seconds between two looks at a job's state
_TRIES = 5  # connections lost in a row before following is given up
# How Ray stops a job: as Ctrl-C does, with time to end in good order (Ray's own: SIGTERM, 3 s).
_STOP_GENTLY = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "20"}


def heed_the_stop_signal() -> None:
    """In a job that is stopped by SIGINT: take it for Ctrl-C, also where it was ignored.

    A shell lets what it starts in the background ignore SIGINT, and that is inherited: on a cluster
    whose `ray start` ran so, a job would not notice that it is stopped and be killed in the end.
    """
    asked = os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT"
    if asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the cluster knows it; times are seconds since the epoch."""

    id: str
    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    exit_code: int | None  # of its command; None while it has none
    message: str  # Ray's word on its state, one line
    command: str
    started: float | None
    ended: float | None
    facts: Mapping[str, str]  # what whoever submitted it wanted to be known

    @property
    def final(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _FINAL


class Jobs:
    """The jobs of one cluster, by the address of its dashboard (`http://head:8265`)."""

    def __init__(self, address: str | None = None) -> None:
        self.address, self._client = _connect(address)

    def submit(
        self,
        command: Sequence[str],
        package: Package,
        *,
        job: str,
        environment: Mapping[str, str] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> int:
        """Send the package and start `command` in it, under the name `job`; bytes of the package.

        Raises InputError for a name that is taken, GoldcrestError where the cluster refuses.
        """
        with tempfile.TemporaryDirectory(prefix="goldcrest-job-") as folder:
            archive = Path(folder) / "package.zip"
            size = write_zip(package, archive)
            runtime_env = {
                "working_dir": str(archive),
                "env_vars": _STOP_GENTLY | dict(environment or {}),
            }
            with self._in_words(job):
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job,
                    runtime_env=runtime_env,
                    metadata=dict(facts or {}),
                )
        return size

    def find(self, job: str) -> Job:
        """One job; InputError if the cluster knows none of that name."""
        with self._in_words(job):
            return _job(self._client.get_job_info(job))

    def all(self) -> list[Job]:
        """Every submitted job that the cluster remembers, oldest first."""
        with self._in_words(""):
            details = self._client.list_jobs()
        jobs = [_job(each) for each in details if each.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0)

    def logs(self, job: str) -> str:
        """What the job has printed so far."""
        with self._in_words(job):
            return str(self._client.get_job_logs(job))

    def stop(self, job: str, *, wait: float = 60.0) -> Job:
        """Ask the job to end as Ctrl-C does; the job once it has ended, or after `wait` seconds."""
        with self._in_words(job):
            self._client.stop_job(job)
        limit = time.monotonic() + wait
        while not (found := self.find(job)).final and time.monotonic() < limit:
            time.sleep(_POLL)
        return found

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Pass what the job prints to `write` until it has ended; the job at its end.

        A lost connection is made again, some times; what was written is not written twice.
        """
        printer = _Once(write)
        lost = 0
        while True:
            try:
                found = self.find(job)
                if found.final:
                    printer(self.logs(job), 0)
                    return found
                asyncio.run(self._tail(job, printer))
                lost = 0
            except InputError:
                raise
            except GoldcrestError:
                lost += 1
                if lost > _TRIES:
                    raise
            time.sleep(_POLL * 2**lost)

    async def _tail(self, job: str, printer: _Once) -> None:
        """Follow the log over one connection, from its beginning."""
        position = 0
        with self._in_words(job):
            async for text in self._client.tail_job_logs(job):
                printer(text, position)
                position += len(text)

    @contextlib.contextmanager
    def _in_words(self, job: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise _told(error, job, self.address) from error


class _Once:
    """Writes a log whose pieces may come twice, each character once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    def __call__(self, text: str, position: int) -> None:
        """`text` begins at character `position` of the log."""
        fresh = text[max(0, self._written - position) :]
        if fresh:
            self._write(fresh)
            self._written += len(fresh)


def exit_code(job: Job) -> int:
    """The exit code that stands for how a job ended: its own, where it has one.

    0 for a success, 130 for a job that was stopped, 128 + signal for one that was killed, 1 for one
    that failed before its command ran.
    """
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        return STOPPED
    code = job.exit_code
    if not code:
        return 1
    return 128 - code if code < 0 else code


def _job(details: JobDetails) -> Job:
    return Job(
        id=str(details.submission_id),
        state=str(details.status),
        exit_code=details.driver_exit_code,
        message=mask_text(next(iter((details.message or "").splitlines()), "")),
        command=mask_command(details.entrypoint),
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        facts=dict(details.metadata or {}),
    )


# --------------------------------------------------------------------------------- connection


def _quiet_ray() -> None:
    """Without the client's announcements: what is worth saying we say ourselves."""
    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(address: str | None) -> tuple[str, JobSubmissionClient]:
    """The client for a cluster, after a first word with it."""
    import ray  # noqa: F401 - JobSubmissionClient needs it set up
    from ray.job_submission import JobSubmissionClient

    use_token_if_there()
    _quiet_ray()
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    wanted = given or DEFAULT_ADDRESS
    # Ray lets these variables win over its argument; an address that was given must win.
    with _environment(RAY_API_SERVER_ADDRESS=wanted, RAY_ADDRESS=None):
        try:
            client = JobSubmissionClient(wanted)
        except Exception as error:
            told = _told(error, "", wanted)
            raise InputError(told.message, hint=told.hint) from error
    return str(client.get_address()), client


@contextlib.contextmanager
def _environment(**wanted: str | None) -> Iterator[None]:
    """Environment variables set (None: unset) for a while."""
    before = {name: os.environ.get(name) for name in wanted}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(wanted)
    try:
        yield
    finally:
        put(before)


def _told(error: Exception, job: str, address: str) -> GoldcrestError:
    """What Ray's client raised, as a sentence."""
    from ray.exceptions import AuthenticationError

    text = str(error)
    if isinstance(error, GoldcrestError):
        return error
    if isinstance(error, AuthenticationError):
        return GoldcrestError(
            f"the cluster at {address} refused the request: it wants another token, or one at all",
            hint="put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH",
        )
    if "status code 404" in text and job:
        return InputError(
            f"the cluster at {address} knows no job '{job}'", hint="see `goldcrest status`"
        )
    if "already" in text and job:
        return InputError(
            f"the cluster at {address} has had a job '{job}' before",
            hint="give another --run-id; to go on with a run, submit it again under a new one",
        )
    if isinstance(error, OSError):
        return GoldcrestError(
            f"no Ray dashboard answers at {address}",
            hint="give --address http://HEAD:8265; is the port forwarded, is the cluster up?",
        )
    first = next(iter(mask_text(text).splitlines()), type(error).__name__)
    return GoldcrestError(f"the cluster at {address} could not do that: {first}")

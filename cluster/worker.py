"""What happens on the worker: find or make one step's artifact.

    inputs there -> result there? done : lease -> result there? done : run -> commit -> tell

The step's output (also that of native code) goes to `logs/<step>.log` in the run's folder; what it
tells about its progress is appended to `progress/<step>.jsonl`, where the driver picks it up. Both
are courtesies: if they can't be written the step runs all the same.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from goldcrest.cluster.artifact import Artifact, Output
from goldcrest.cluster.errors import GoldcrestError, StepError, StoreError
from goldcrest.cluster.masking import mask_secrets, mask_text
from goldcrest.cluster.placement import own_resources, worker_resources
from goldcrest.cluster.process_id import aside
from goldcrest.cluster.runtime import RayRuntime, limit_threads, seed_everything
from goldcrest.cluster.source_hash import source_hash

if TYPE_CHECKING:
    from goldcrest.cluster.dag import Step
    from goldcrest.cluster.lease import Lease
    from goldcrest.cluster.store import Store

MANIFEST_SCHEMA = 1
_PROGRESS_INTERVAL = 0.2  # seconds between two lines of progress
_PACKAGES = (
    "goldcrest",
    "ray",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "transformers",
    "pyarrow",
)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a worker must know of the run that its step belongs to."""

    run_id: str
    pipeline: str
    store_uri: str
    folder: Path  # the run's folder, on a disk that driver and workers share, or a private one


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a worker gives back; the artifact itself stays in the store."""

    step: str
    key: str
    state: str  # "ran", or "cached" where another run was faster
    seconds: float
    place: str


def execute_step(step: Step, context: RunContext, *upstream: Outcome) -> Outcome:
    """Make sure that the step's artifact is in the store. Runs as a Ray task.

    `upstream` only makes Ray wait for the steps that this one reads. Exceptions that the task wants
    to be repeated on leave as they are; every other becomes a StepError, which always travels.
    """
    teller = Teller(context.folder, step.name)
    with captured_output(context.folder / "logs" / f"{step.name}.log"), noted_exit(teller):
        try:
            return _find_or_make(step, context, teller)
        except step.task.retry_on as error:
            traceback.print_exc()
            told = _storage_error(error, context)
            if told is not None:
                raise told from None
            raise
        except GoldcrestError as error:
            # Its sentence says all; a traceback would only bury it. What caused it is kept.
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a task may raise anything
            traceback.print_exc()
            raise StepError(in_words(error), hint=_hint(error)) from None


def _find_or_make(step: Step, context: RunContext, teller: Teller) -> Outcome:
    from goldcrest.cluster.store import Store

    store = Store.open(context.store_uri)
    place = describe_place()
    outcome = functools.partial(Outcome, step=step.name, key=step.key, place=place)
    if store.find(step.key) is not None:
        return outcome(state="cached", seconds=0.0)
    owner = f"{step.name} of run {context.run_id}"
    with store.lease(step.key, owner=owner, wait=teller.waiting) as lease:
        if store.find(step.key) is not None:
            return outcome(state="cached", seconds=0.0)
        teller.tell("begin", place=place, pid=os.getpid())
        try:
            seconds = _make(step, context, store, lease, teller)
        except StoreError:
            # A damaged input that `find` trusted (its time stamps had not changed) must not be
            # found again: hash every byte, so that the repeated command makes it anew.
            for key in filter(None, step.input_keys.values()):
                store.verify(key)
            raise
        store.drop_scratch(step.key)
    return outcome(state="ran", seconds=seconds)


def _make(step: Step, context: RunContext, store: Store, lease: Lease, teller: Teller) -> float:
    """Run the task and commit what it wrote; returns the seconds of the task itself."""
    inputs = {name: _input(step, store, name) for name in step.inputs}
    own = own_resources(step)
    limit_threads(own.cpus)
    seed_everything(step.seed)
    folder = store.begin(step.key, lease)
    try:
        out = Output(
            folder,
            runtime=RayRuntime(
                held_cpus=own.cpus,
                workers=worker_resources(step),
                node=None if store.shared_paths else _this_node(),
            ),
            seed=step.seed,
            scratch=store.scratch(step.key),
            on_progress=teller.progress,
            on_log=teller.log,
        )
        started = time.perf_counter()
        step.task(step.config, out=out, **inputs)
        seconds = time.perf_counter() - started
        store.commit(step.key, folder, _manifest(step, context, out, seconds), lease)
    finally:
        store.discard(folder)
    return seconds


def _input(step: Step, store: Store, parameter: str) -> Artifact | None:
    key = step.input_keys[parameter]
    if key is None:
        return None
    artifact = store.find(key, verify=False)  # members are verified when the task reads them
    if artifact is None:
        raise StepError(
            f"the result of step '{step.inputs[parameter]}' is no longer in the store",
            hint="repeat the command: it will be made again",
        )
    return artifact


def _manifest(step: Step, context: RunContext, out: Output, seconds: float) -> dict[str, Any]:
    """Everything about how the artifact came to be; the store adds its files."""
    metrics = dict(out.collected_metrics)
    return {
        "schema": MANIFEST_SCHEMA,
        "key": step.key,
        "task": step.task_name,
        "version": step.task.version,
        "step": step.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 3),
        "config": mask_secrets(step.canonical),
        "seed": step.seed,
        "inputs": dict(step.input_keys),
        "metrics": metrics,
        "measurements": out.measurements,
        "host": {
            "name": socket.gethostname(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "packages": package_versions(),
        "source": source_hash(step.task.function.__module__),
        "run": context.run_id,
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that results may depend on, of those installed."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def describe_place() -> str:
    """Where this process runs: the host and the GPUs that Ray gave it."""
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return socket.gethostname() + (f" gpu {','.join(gpus)}" if gpus else "")


def in_words(error: BaseException) -> str:
    """An exception of a task as one sentence."""
    if isinstance(error, GoldcrestError):
        return error.message
    if isinstance(error, SystemExit):
        return f"the step ended its process with sys.exit({error.code!r})"
    if isinstance(error, MemoryError):
        return (
            f"the step ran out of memory: {error}" if str(error) else "the step ran out of memory"
        )
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hint(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "use smaller batches, or a node with more memory"
    return None


def _storage_error(error: BaseException, context: RunContext) -> GoldcrestError | None:
    """A full or read-only disk in words: repeating the step would not mend it."""
    from goldcrest.cluster.store import storage_error

    return storage_error(error, context.store_uri) if isinstance(error, OSError) else None


class Teller:
    """Appends what happens to `progress/<step>.jsonl`; lines are whole or absent for the reader."""

    def __init__(self, folder: Path, step: str) -> None:
        self._path = folder / "progress" / f"{step}.jsonl"
        self._last = 0.0

    def tell(self, kind: str, **facts: Any) -> None:
        """Write one line; a disk that refuses it costs the line, not the step."""
        line = json.dumps({"kind": kind, "time": time.time(), **facts}) + "\n"
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as stream:
                stream.write(line.encode())

    def progress(self, share: float | None, note: str = "") -> None:
        """A step's progress, at most a few lines a second; the end is never left out."""
        now = time.monotonic()
        if now - self._last >= _PROGRESS_INTERVAL or share == 1.0:
            self._last = now
            self.tell("progress", share=share, note=note)

    def log(self, row: Mapping[str, float]) -> None:
        """A row of the step's curves."""
        self.tell("log", row=dict(row))

    def waiting(self, note: str) -> None:
        """Another run has the lease on this step."""
        self.tell("progress", share=None, note=note)


@contextlib.contextmanager
def captured_output(path: Path) -> Iterator[None]:
    """Send what this process prints, natively or from Python, to the end of the file `path`.

    The stack of a fatal signal goes there too: it is all that such an end leaves behind. Secrets
    in the file are masked at the end, as only then native output is all there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError:
        yield
        return
    kept = {target: os.dup(target) for target in (1, 2)}
    before = sys.stdout, sys.stderr
    _flush()
    for target in kept:
        os.dup2(stream.fileno(), target)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream, all_threads=True)
    try:
        yield
    finally:
        _flush()
        sys.stdout, sys.stderr = before
        for target, saved in kept.items():
            os.dup2(saved, target)
            os.close(saved)
        faulthandler.enable(2)
        with contextlib.suppress(OSError):
            stream.close()
        mask_log(path)


def mask_log(path: Path) -> None:
    """Mask the secrets in a log, line by line: it may be long. One that is absent stays so.

    The file is replaced as a whole: what somebody still writes to the old one is seen by nobody.
    """
    masked = aside(path)
    secret = False
    with contextlib.suppress(OSError):
        with (
            path.open(encoding="utf-8", errors="backslashreplace", newline="") as before,
            masked.open("w", encoding="utf-8", newline="") as after,
        ):
            for line in before:
                told = mask_text(line)
                secret |= told != line
                after.write(told)
        if secret:
            masked.replace(path)
    with contextlib.suppress(OSError):
        masked.unlink(missing_ok=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


@contextlib.contextmanager
def noted_exit(teller: Teller) -> Iterator[None]:
    """Note a call of `os._exit` by the step: nothing else would tell it from a kill."""
    plain = os._exit
    owner = os.getpid()

    def noting(status: int) -> NoReturn:
        if os.getpid() == owner:  # a forked child ends that way by rights
            teller.tell("exit", status=status)
        plain(status)

    os._exit = noting
    try:
        yield
    finally:
        os._exit = plain

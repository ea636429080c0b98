"""Ray Train glue: the engine's loop in a group of workers that is restarted when one is lost.

Ray Train starts the workers, makes their process group, notices a dead one and starts the group
again. A worker that failed counts against `max_failures`; a node that was taken away with notice
(drained: a spot machine, an autoscaler, `ray drain-node`) counts against `max_preemptions` only,
so a week on spot machines does not use up what is there for real faults. Either way the work since
the last checkpoint is lost, no more. Two things Ray Train does not do for us:

- Its reported checkpoints are registered some seconds late: a worker killed right after a report
  can lose the last two. Ours are on disk when `_save` returns, so we report none and resume from
  `scratch`.
- It repeats after every error, also one that will come again (a wrong shape, a loss that is NaN).
  A worker therefore writes an error of the training itself into `failure.json`; the restarted group
  sees it and ends at once, and the driver raises it. Errors that only echo another worker's death
  are not written.

Worker 0 writes `status.json` now and then, the driver reads it and calls the caller's functions.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.errors import GoldcrestError, InputError, StepError
from goldcrest.cluster.training_config import TrainingConfig

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from goldcrest.cluster.api import Objective, Resources
    from goldcrest.cluster.training import CallbackReporter

_STATUS = "status.json"
_FAILURE = "failure.json"
_SECONDS_BETWEEN_STATUS = 0.5
_KINDS = {"InputError": InputError, "StepError": StepError}


def _write_json(path: Path, value: Any) -> None:
    """Replace a small JSON file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, `{}` if it is absent or unreadable just now."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


class StatusReporter:
    """Worker 0's voice: writes share, note and history to `status.json`."""

    def __init__(self, scratch: Path, attempt: str) -> None:
        self._path = scratch / _STATUS
        self._status: dict[str, Any] = {"attempt": attempt, "done": 0.0, "note": "", "rows": []}
        self._last = 0.0

    def progress(self, done: float, note: str) -> None:
        """Write the share done and a note, at most twice a second."""
        self._status |= {"done": done, "note": note}
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_STATUS:
            self._last = time.monotonic()
            _write_json(self._path, self._status)

    def epochs(self, rows: list[dict[str, float]]) -> None:
        """Write the history."""
        self._status["rows"] = rows
        _write_json(self._path, self._status)


def _comes_again(error: BaseException) -> bool:
    """Whether `error` is one of the training itself, that a restart would only repeat.

    Ours are. Of the others only those that were raised inside the objective, that is, below the
    loop's own file, and not by DeepSpeed or torch.distributed: when a worker dies, the others fail
    somewhere in there, under many names. A disk or a connection that failed may recover.
    """
    if isinstance(error, GoldcrestError):
        return True
    if isinstance(error, OSError):
        return False
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    below = [place for place, file in enumerate(files) if file.name == "training_loop.py"]
    inner = files[below[-1] + 1 :] if below else []
    distributed = any({"deepspeed", "distributed"} & set(file.parts) for file in inner)
    return bool(inner) and not distributed


def _work(job: dict[str, Any]) -> None:
    """One worker of the group: runs in its own process, started by Ray Train."""
    scratch = Path(job["scratch"])
    if _read_json(scratch / _FAILURE).get("attempt") == job["attempt"]:
        return  # the group was restarted after an error that would come again
    try:
        _train(job, scratch)
    except Exception as error:
        if _comes_again(error):
            hint = error.hint if isinstance(error, GoldcrestError) else None
            message = error.message if isinstance(error, GoldcrestError) else _describe(error)
            record = {"attempt": job["attempt"], "kind": type(error).__name__, "hint": hint}
            _write_json(scratch / _FAILURE, record | {"message": message})
        raise


def _describe(error: Exception) -> str:
    """An error of the objective: its type, its message and the place it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.name}() ({place.filename}:{place.lineno}): {error}"


def _train(job: dict[str, Any], scratch: Path) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from goldcrest.cluster.training_loop import Place, Trainer

    config: TrainingConfig = job["config"]
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    reporter = StatusReporter(scratch, job["attempt"])
    Trainer(
        job["objective"], config, place=place, scratch=scratch, seed=job["seed"], reporter=reporter
    ).run()


@contextmanager
def _watched(scratch: Path, attempt: str, reporter: CallbackReporter) -> Iterator[None]:
    """While inside, a thread passes worker 0's status on to `reporter`; at the end once more."""
    ended = threading.Event()

    def tell() -> None:
        status = _read_json(scratch / _STATUS)
        if status.get("attempt") == attempt:
            reporter.epochs(status["rows"])
            reporter.progress(status["done"], status["note"])

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_STATUS):
            tell()

    thread = threading.Thread(target=watch, name="training-status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        tell()


def _note_missing_resources(config: TrainingConfig, reporter: CallbackReporter) -> None:
    """Say what the workers wait for if the cluster is too small for them (it may still grow)."""
    import ray

    held = ray.cluster_resources()
    wanted = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    for name, each in wanted.items():
        if config.workers * each > held.get(name, 0.0):
            reporter.progress(
                0.0,
                f"waiting for {config.workers * each:g} {name} for {config.workers} workers; "
                f"the cluster has {held.get(name, 0.0):g}",
            )


def _trainer_class() -> type[TorchTrainer]:
    """TorchTrainer without the actor that removes placement groups of a controller that died: it
    asks the dashboard's state API, which a run without a dashboard does not have, and then says so
    every second. The driver of a run does its work (`reservations.py`)."""
    from ray.train.torch import TorchTrainer

    class QuietTorchTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            every = super()._create_default_callbacks()  # type: ignore[misc]
            return [c for c in every if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return QuietTorchTrainer


@contextmanager
def _ray_train_settings() -> Iterator[None]:
    """Ray Train's switches, which are environment variables; what the user has set is kept.

    The controller looks for the end of the workers every 0.2 s instead of 2 s, and for nodes that
    are drained every second instead of 5 s; on a cluster of one node nobody watches for them (one
    process less to start).
    """
    import ray

    wanted = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
    if len(ray.nodes()) == 1:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    interrupt = signal.getsignal(signal.SIGINT)  # Ray Train puts its own and leaves it there
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)
        for name in added:
            del os.environ[name]


def _per_worker(config: TrainingConfig, wanted: Resources) -> dict[str, float]:
    """Ray's resources of one worker."""
    resources = {"CPU": config.cpus_per_worker, **wanted.custom}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    if wanted.memory is not None:
        resources["memory"] = wanted.memory
    return resources


def fit(
    objective: Objective,
    config: TrainingConfig,
    wanted: Resources,
    *,
    scratch: Path,
    seed: int,
    reporter: CallbackReporter,
) -> None:
    """Run the group of workers to the end; the result is the last checkpoint in `scratch`."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig

    scratch.mkdir(parents=True, exist_ok=True)
    attempt = uuid.uuid4().hex
    gpu = config.gpus_per_worker > 0
    job = {"objective": objective, "config": config, "scratch": str(scratch.resolve())}
    labels: dict[str, Any] = {"label_selector": dict(wanted.labels)} if wanted.labels else {}
    trainer = _trainer_class()(
        _work,
        train_loop_config=job | {"seed": seed, "attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpu,
            resources_per_worker=_per_worker(config, wanted),
            accelerator_type=wanted.accelerator if gpu else None,
            **labels,
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(scratch.resolve()),
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                max_preemption_failures=config.max_preemptions,
            ),
        ),
    )
    _note_missing_resources(config, reporter)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        with _ray_train_settings(), _watched(scratch, attempt, reporter):
            trainer.fit()
    except Exception as error:
        _raise_recorded(scratch, attempt)
        raise _used_up(error, config) from error
    _raise_recorded(scratch, attempt)


def _used_up(error: Exception, config: TrainingConfig) -> StepError:
    """Which budget of restarts was used up."""
    from ray.train import PreemptionError

    again = "repeat the command to continue from the last checkpoint, or raise "
    if isinstance(error, PreemptionError):
        return StepError(
            f"training lost its nodes to preemption more than {config.max_preemptions} times",
            hint=f"{again}max_preemptions",
        )
    return StepError(
        f"training lost its workers more than {config.max_failures} times: {error}",
        hint=f"{again}max_failures",
    )


def _raise_recorded(scratch: Path, attempt: str) -> None:
    """Raise the error that a worker wrote down in this attempt, if there is one."""
    failure = _read_json(scratch / _FAILURE)
    if failure.get("attempt") == attempt:
        raise _KINDS.get(failure["kind"], StepError)(failure["message"], hint=failure["hint"])

"""Where a step's own fan-out runs: in this process (`LocalRuntime`) or on Ray (`RayRuntime`).

Both give the same results in the same order. A transform sees the same tables under both: batches
of at most `batch_rows` rows that never cross the border of a shard.

On Ray, a step that fans out should hold no CPU itself (`@task(cpus=0)`): what it hands out holds
its own. `RayRuntime` refuses, in words, what could never be placed beside what the step holds.
"""

from __future__ import annotations

import collections
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import Objective, Resources, Trained
from goldcrest.cluster.artifact import Output
from goldcrest.cluster.errors import StepError
from goldcrest.cluster.pieces import Piece, cut
from goldcrest.cluster.placement import (
    NODE_ID,
    for_call,
    for_training,
    on_node,
    task_options,
    times,
)
from goldcrest.cluster.profile import NodeKind, lacking, running_nodes
from goldcrest.cluster.training_config import TrainingConfig

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TASK_RETRIES = 3  # after a lost worker; an exception of the function is final
_ACTOR_RESTARTS = 3


class LocalRuntime:
    """Everything here, one after the other: the plain twin of `RayRuntime`, for tests."""

    gpus = 0.0

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        note: str = "",
    ) -> Iterator[Any]:
        """`function(item)` for every item, in order."""
        yield from map(function, items)

    def stream(
        self,
        shards: Sequence[Path],
        transform: Callable[..., Callable[[pa.Table], pa.Table]],
        arguments: Mapping[str, Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        workers: int = 2,
        batch_rows: int = 32,
    ) -> Iterator[pa.Table]:
        """`transform(**arguments)` built once and applied to every batch, in order."""
        apply = transform(**arguments)
        for piece in cut(shards, 1, batch_rows):
            for table in piece.batches():
                yield apply(table)

    def train(self, objective: Objective, config: TrainingConfig, out: Output) -> Trained:
        """The training engine in this process, as one worker."""
        from goldcrest.cluster.training import train_local

        return train_local(
            objective,
            config,
            scratch=out.scratch,
            seed=out.seed,
            on_log=lambda row: out.log(**row),
            on_progress=out.progress,
        )


class RayRuntime:
    """Fan-out on the Ray cluster that this process belongs to.

    `held_cpus` are the CPU cores that the step itself holds while it waits for its fan-out,
    `workers` is what a cluster profile gives to each of its workers. `node` is the id of the one
    node where the paths that they are given mean something, None where every node sees them.
    """

    def __init__(
        self,
        *,
        held_cpus: float = 0.0,
        workers: Resources | None = None,
        node: str | None = None,
    ) -> None:
        self._held_cpus = held_cpus
        self._workers = workers or Resources(cpus=0.0)
        self._node = node

    @property
    def gpus(self) -> float:
        """GPUs that the profile gives each worker."""
        return self._workers.gpus

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        note: str = "",
    ) -> Iterator[Any]:
        """`function(item)` as Ray tasks, results in order, a bounded number in flight.

        A lost worker's item is repeated elsewhere; an exception of the function is raised here.
        """
        import ray

        wanted = self._room_for(cpus, gpus, "map")
        cpus = wanted.cpus
        call = ray.remote(_call).options(
            **task_options(wanted),
            name=note or getattr(function, "__name__", "map"),
            max_retries=_TASK_RETRIES,
        )
        shared = ray.put(function)
        waiting: collections.deque[Any] = collections.deque()
        limit = _in_flight(cpus, gpus, *self._offered())
        remaining = iter(items)
        try:
            for item in itertools.islice(remaining, limit):
                waiting.append(call.remote(shared, item, cpus))
            while waiting:
                result = _get(waiting.popleft(), note)
                waiting.extend(call.remote(shared, i, cpus) for i in itertools.islice(remaining, 1))
                yield result
        finally:
            for reference in waiting:  # the caller stopped early, or an item failed
                ray.cancel(reference)

    def stream(
        self,
        shards: Sequence[Path],
        transform: Callable[..., Callable[[pa.Table], pa.Table]],
        arguments: Mapping[str, Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        workers: int = 2,
        batch_rows: int = 32,
    ) -> Iterator[pa.Table]:
        """Shards through a pool of Ray Data actors; see `Runtime.stream`.

        The actors read the shards themselves, so no read tasks compete with them for CPU cores, and
        return each batch as Arrow IPC bytes, so its rows and schema arrive as the transform made
        them.
        """
        import pyarrow as pa

        wanted = self._room_for(cpus, gpus, "stream")
        pieces = cut(shards, workers, batch_rows)
        if not pieces:
            return
        dataset = _pipeline(
            pieces,
            {"transform": transform, "arguments": dict(arguments), "cpus": wanted.cpus},
            wanted,
            workers=min(workers, len(pieces)),
        )
        try:
            blocks: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            for block in blocks:
                for batch in block.column("batch"):
                    yield pa.ipc.open_stream(batch.as_buffer()).read_all()
        except Exception as error:
            raise _own_error(error, "stream") from error

    def train(self, objective: Objective, config: TrainingConfig, out: Output) -> Trained:
        """The training engine on Ray Train workers."""
        from goldcrest.cluster.training import train_on_ray

        placed = for_training(self._workers, config)
        wanted = self._room_for(
            placed.cpus_per_worker, placed.gpus_per_worker, "train", workers=placed.workers
        )
        return train_on_ray(
            objective,
            placed,
            wanted=wanted,
            scratch=out.scratch,
            seed=out.seed,
            on_log=lambda row: out.log(**row),
            on_progress=out.progress,
        )

    def _room_for(self, cpus: float, gpus: float, what: str, *, workers: int = 1) -> Resources:
        """What each worker asks for; work that would wait for ever is refused (Ray only waits).

        `workers` must run at the same time; on several nodes Ray waits for as many as it needs.
        """
        wanted = for_call(self._workers, cpus=cpus, gpus=gpus)
        if self._node is not None:
            return self._on_own_node(wanted, self._node, what, workers)
        cpus = wanted.cpus
        offered, offered_gpus = self._offered()
        if cpus > offered:
            raise StepError(
                f"{what} asks for {cpus:g} CPU cores per worker, but beside the "
                f"{self._held_cpus:g} that its step holds the cluster has {offered:g}",
                hint="declare cpus=0 for a step that only hands work out",
            )
        if gpus > offered_gpus:
            raise StepError(
                f"{what} asks for {gpus:g} GPUs per worker; the cluster has {offered_gpus:g}",
                hint="set the config's number of GPUs to 0, or use a cluster with GPUs",
            )
        return wanted

    def _on_own_node(self, wanted: Resources, node: str, what: str, workers: int) -> Resources:
        """`wanted` on the step's own node, refused where that is too small for it."""
        lacks = lacking(times(wanted, workers), self._own_node(node))
        if lacks:
            raise StepError(
                f"{what} asks for {' and '.join(lacks)}: with the store in a bucket, the workers "
                "of a step run on its own node, as only that has the files they read",
                hint="send the step to a larger node (labels under steps: of the cluster profile), "
                "ask for less, or use a store in a folder that all nodes share",
            )
        return on_node(wanted, node)

    def _offered(self) -> tuple[float, float]:
        """CPU cores and GPUs that are there for workers."""
        import ray

        if self._node is not None:
            own = self._own_node(self._node)
            return own.cpus, own.gpus
        total = ray.cluster_resources()
        return total.get("CPU", 0.0) - self._held_cpus, total.get("GPU", 0.0)

    def _own_node(self, node: str) -> NodeKind:
        """The step's own node, without the cores that the step holds."""
        (own,) = (found for found in running_nodes() if found.labels.get(NODE_ID) == node)
        return own.model_copy(update={"cpus": own.cpus - self._held_cpus})


def _pipeline(
    pieces: Sequence[Piece],
    constructor: Mapping[str, Any],
    wanted: Resources,
    *,
    workers: int,
) -> ray.data.Dataset:
    """A Ray Data pipeline: one row per piece in, one row per batch out."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"piece": index} for index in range(len(pieces))]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # Ray Data would restart for ever an actor that crashes on the same batch each time. The
        # bounds have no named parameters yet, and the unnamed ones are deprecated.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            _StreamWorker,
            fn_constructor_kwargs={"pieces": list(pieces), **constructor},
            batch_size=1,
            batch_format="pyarrow",
            **task_options(wanted),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            max_restarts=_ACTOR_RESTARTS,
            max_task_retries=_ACTOR_RESTARTS,
        )


class _StreamWorker:
    """One long-lived actor of `RayRuntime.stream`."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        transform: Callable[..., Callable[[pa.Table], pa.Table]],
        arguments: Mapping[str, Any],
        cpus: float,
    ) -> None:
        limit_threads(cpus)
        self._pieces = pieces
        self._apply = transform(**arguments)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import pyarrow as pa

        for index in batch.column("piece").to_pylist():
            for table in self._pieces[index].batches():
                made = self._apply(table)
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, made.schema) as writer:
                    writer.write_table(made)
                content = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
                yield pa.table({"batch": content})


def _call(function: Callable[..., Any], item: Any, cpus: float) -> Any:
    limit_threads(cpus)
    return function(item)


def _in_flight(cpus: float, gpus: float, offered: float, offered_gpus: float) -> int:
    """Twice as many calls as can run at once: workers never wait for the driver."""
    slots = [offered / cpus if cpus else offered]
    if gpus:
        slots.append(offered_gpus / gpus)
    return max(2, math.ceil(2 * min(slots)))


def _get(reference: Any, note: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except Exception as error:
        raise _own_error(error, note or "map") from error


def _own_error(error: Exception, what: str) -> Exception:
    """The exception that the function itself raised, out of Ray's wrapping."""
    import ray.exceptions as failures

    cause: BaseException = error
    while isinstance(cause, failures.RayError):
        inner = getattr(cause, "cause", None) or cause.__cause__
        # Ray Data raises a lost actor's error "from" an empty marker of its own: not a reason.
        if not isinstance(inner, BaseException) or type(inner).__module__.startswith("ray.data"):
            break
        cause = inner
    if isinstance(cause, failures.RayError):
        return StepError(f"a worker of {what} was lost again and again: {first_line(cause)}")
    return cause if isinstance(cause, Exception) else error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def limit_threads(cpus: float) -> None:
    """Let native libraries of this process use as many threads as the work declared CPU cores."""
    import threadpoolctl

    count = max(1, int(cpus))
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)
    threadpoolctl.threadpool_limits(count)
    _with_torch("threads", lambda torch: torch.set_num_threads(count))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Tasks should use `out.seed` with generators of their own; this is for libraries that don't. A
    worker's process is used again, so even a step that needs no seed must not depend on its past.
    """
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    _with_torch("seed", lambda torch: torch.manual_seed(seed))


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Runs actions right after torch is imported, so that nobody imports it only to set it up."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[Any], Any]] = {}

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find torch with a loader that runs the actions; nothing else."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                for action in self.actions.values():
                    action(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


_after_torch = _AfterTorch()


def _with_torch(what: str, action: Callable[[Any], Any]) -> None:
    """Run `action(torch)` now, or once torch is imported; the last action for `what` counts."""
    if "torch" in sys.modules:
        action(sys.modules["torch"])
        return
    _after_torch.actions[what] = action
    if _after_torch not in sys.meta_path:
        sys.meta_path.insert(0, _after_torch)

"""Small tasks and pipelines for the tests of the engine; importable by Ray's workers."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    InputError,
    InputFiles,
    Output,
    TrainingConfig,
    task,
)
from tests.cluster.training_toys import Toy


class NumberConfig(Config):
    """A number, and how long to think about it."""

    value: int = 1
    seconds: Annotated[float, DoesNotChangeResult] = 0.0
    note: Annotated[str, DoesNotChangeResult] = ""


class FilesConfig(Config):
    """Files outside the store."""

    corpus: Annotated[str | None, InputFiles] = None
    several: Annotated[tuple[str, ...], InputFiles] = ()


class TrainToyConfig(Config):
    """A training of the engine's toy."""

    training: TrainingConfig = TrainingConfig(epochs=1, batch_size=16)


class TroubleConfig(Config):
    """How a step misbehaves; `marker` is a folder that remembers earlier attempts."""

    kind: str = "none"
    marker: Annotated[str, DoesNotChangeResult] = ""
    salt: int = 0


@task(cpus=0.5)
def number(cfg: NumberConfig, out: Output) -> None:
    """Write a number down."""
    time.sleep(cfg.seconds)
    out.json("number", cfg.value)
    out.metrics(numbers={"last": cfg.value})


def check_number(cfg: NumberConfig) -> None:
    """Only positive numbers can be counted."""
    if cfg.value < 0:
        raise InputError(f"{cfg.value} is less than nothing", hint="give a number from 0")


@task(cpus=0.5, check=check_number)
def count(cfg: NumberConfig, source: Artifact | None = None, *, out: Output) -> None:
    """Write a number down that was looked at before the run."""
    out.json("number", cfg.value)


@task(cpus=0.5)
def total(cfg: NumberConfig, first: Artifact, out: Output, **further: Artifact) -> None:
    """Add the numbers of all inputs to the own one."""
    out.json("number", cfg.value + sum(a.json("number") for a in (first, *further.values())))


@task(cpus=0.5)
def add(cfg: NumberConfig, left: Artifact, right: Artifact | None = None, *, out: Output) -> None:
    """Add the numbers of the inputs to the own one."""
    out.log(epoch=0.0, loss=1.0)
    out.progress(0.5, "half way")
    time.sleep(cfg.seconds)
    total = cfg.value + sum(a.json("number") for a in (left, right) if a is not None)
    out.log(epoch=1.0, loss=0.5)
    out.progress(1.0, "done")
    out.json("number", total)
    out.metrics(numbers={"total": total}, quarantined=1)
    out.measure(speed={"per_second": 3.0})


@task(cpus=0.5)
def read_files(cfg: FilesConfig, out: Output) -> None:
    """Count the bytes of the corpus."""
    files = sorted(p for p in Path(cfg.corpus or ".").rglob("*") if p.is_file())
    out.json("number", sum(p.stat().st_size for p in files))


@task(cpus=0.5)
def bundle(cfg: NumberConfig, source: Artifact, out: Output) -> None:
    """A model bundle by name."""
    out.json("bundle", {"name": "dense", "number": source.json("number")})


@task(cpus=0.5, retries=0, retry_on=(ConnectionError,))
def trouble(cfg: TroubleConfig, source: Artifact | None = None, *, out: Output) -> None:
    """Fail in the way that the config names."""
    print(f"about to: {cfg.kind} --token not-a-secret")
    _misbehave(cfg)
    out.json("number", 0)


@task(cpus=0.5, timeout="1.5s")
def dawdle(cfg: TroubleConfig, source: Artifact, out: Output) -> None:
    """Take longer than the timeout."""
    print(f"about to: {cfg.kind} --token not-a-secret")
    _misbehave(cfg)


@task(cpus=0.5, retries=2, retry_on=(ConnectionError,))
def flaky(cfg: TroubleConfig, out: Output) -> None:
    """Fail at the first attempt, succeed at the second."""
    attempts = Path(cfg.marker)
    attempts.mkdir(parents=True, exist_ok=True)
    count = len(list(attempts.iterdir()))
    (attempts / f"{count}-{os.getpid()}").touch()
    if count == 0:
        _misbehave(cfg)
    out.json("number", 7)


def _misbehave(cfg: TroubleConfig) -> None:
    if cfg.kind == "raise":
        raise ValueError("fewer utterances than clusters")
    if cfg.kind == "input":
        raise InputError("the corpus is empty", hint="give another --corpus")
    if cfg.kind == "connection":
        raise ConnectionError("the line is dead")
    if cfg.kind == "unpicklable":
        raise _UnpicklableError(lambda: 1)
    if cfg.kind == "exit":
        os._exit(3)
    if cfg.kind == "sysexit":
        raise SystemExit(4)
    if cfg.kind == "segfault":
        ctypes.string_at(0)
    if cfg.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.kind == "memory":
        raise MemoryError("no room for 1 TiB")
    if cfg.kind == "sleep":
        time.sleep(60)
    if cfg.kind == "full":
        raise OSError(28, "No space left on device", "/somewhere")


class _UnpicklableError(Exception):
    def __init__(self, content: Any) -> None:
        super().__init__("this error cannot travel")
        self.content = content

    def __reduce__(self) -> Any:
        raise TypeError("no")


class ChainConfig(Config):
    """A chain of `length` additions after one number."""

    length: int = Field(7, ge=0)
    first: NumberConfig = NumberConfig()
    rest: NumberConfig = NumberConfig(value=1)


class Chain:
    """A pipeline object: number -> add -> add -> ..."""

    Config = ChainConfig

    @staticmethod
    def build(cfg: ChainConfig) -> Any:
        """One number and `length` additions."""
        node = number.bind(cfg.first)
        for index in range(cfg.length):
            node = add.bind(cfg.rest, node, name=f"add{index}")
        return node


def square(item: int) -> int:
    """For Runtime.map."""
    return item * item


def crash_on_three(item: int) -> int:
    """For Runtime.map: one bad item."""
    if item == 3:
        raise ValueError("three is bad")
    return item


class Doubler:
    """For Runtime.stream: doubles column `x`."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, table: pa.Table) -> pa.Table:
        """(x) -> (x * factor, rows of the batch)."""
        values = [value.as_py() * self.factor for value in table.column("x")]
        return pa.table({"x": values, "rows": [table.num_rows] * table.num_rows})


def rows_of(tables: Iterator[pa.Table]) -> list[tuple[int, int]]:
    """All rows of the tables as pairs."""
    return [(r["x"], r["rows"]) for table in tables for r in table.to_pylist()]


class CrashOnBatch:
    """For Runtime.stream: a transform that fails."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, table: pa.Table) -> pa.Table:
        """Raise, or take the process along."""
        if self.kind == "raise":
            raise ValueError("bad batch")
        os._exit(5)


def process_id(marker: str) -> int:
    """For Runtime.map: the first attempt of an item with a marker kills its worker."""
    if marker and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def thread_count(_: int) -> tuple[str, int]:
    """For Runtime.map: threads of OpenMP's environment and of torch."""
    import torch

    return os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


@task(cpus=0)
def coordinate(cfg: NumberConfig, out: Output) -> None:
    """Hand out a map and a stream, holding nothing itself."""
    import pyarrow.parquet as pq

    total = sum(out.runtime.map(_times_one, [cfg.value] * 4, note=f"map {cfg.value}"))
    shard = out.scratch / "x.parquet"
    shard.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": range(50)}), shard)
    tables = out.runtime.stream([shard], Doubler, {"factor": 2}, workers=2, batch_rows=10)
    out.json("number", total + sum(x for x, _ in rows_of(tables)))


def _times_one(item: int) -> int:
    return item


def where(item: int) -> str:
    """The label `pool` of the node that this runs on."""
    import ray

    me = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == me)
    return str(node["Labels"].get("pool", ""))


class Located(Toy):
    """A toy that tells where it is trained."""

    def evaluate(self, model: Any, *, epoch: int) -> dict[str, float]:
        """1 on a node of the pool `gpu`."""
        return {"on_gpu_node": float(where(0) == "gpu")}


@task(cpus=0)
def train_toy(cfg: TrainToyConfig, out: Output) -> None:
    """Train, and write down on which nodes the step, its map and its training ran."""
    trained = out.runtime.train(Located(), cfg.training, out)
    mapped = sorted(set(out.runtime.map(where, range(4))))
    trained_there = trained.history[-1]["on_gpu_node"]
    out.json("places", {"own": where(0), "map": mapped, "trained_on_gpu_node": trained_there})


def read_there(_: int, *, folder: Path) -> str:
    """The label `pool` of a node that has the folder; an error on one that has not."""
    (folder / "number.json").read_text(encoding="utf-8")
    time.sleep(0.5)  # so that other nodes would get some of the work, were they asked
    return where(0)


class ReadThere:
    """For Runtime.stream: `read_there` for every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        """(x) -> (pool), one row."""
        return pa.table({"pool": [read_there(0, folder=self.folder)]})


@task(cpus=0)
def hand_paths(cfg: NumberConfig, source: Artifact, out: Output) -> None:
    """Hand the path of the input to a map and a stream, and write down where they ran."""
    import pyarrow.parquet as pq

    shard = out.scratch / "x.parquet"
    pq.write_table(pa.table({"x": range(4)}), shard)
    work = functools.partial(read_there, folder=source.path)
    mapped = sorted(set(out.runtime.map(work, range(4))))
    tables = out.runtime.stream([shard], ReadThere, {"folder": source.path}, batch_rows=1)
    streamed = sorted({pool for table in tables for pool in table.column("pool").to_pylist()})
    out.json("places", {"own": where(0), "map": mapped, "stream": streamed})


@task(cpus=0.5)
def look(cfg: NumberConfig, out: Output) -> None:
    """Write down on which node this runs."""
    out.json("places", {"own": where(0)})


class PoolsConfig(Config):
    """Nothing to choose."""


class Pools:
    """A pipeline whose steps say where they ran."""

    Config = PoolsConfig

    @staticmethod
    def build(cfg: PoolsConfig) -> Any:
        """Two that compute, one that hands out."""
        return [
            look.bind(NumberConfig(), name="look"),
            look.bind(NumberConfig(value=2), name="hold"),
            train_toy.bind(TrainToyConfig(), name="train"),
        ]


class Paths:
    """A pipeline whose steps hand paths of their inputs and of their scratch to workers."""

    Config = PoolsConfig

    @staticmethod
    def build(cfg: PoolsConfig) -> Any:
        """Two that hand out, several times, so that no luck makes them right."""
        source = number.bind(NumberConfig())
        handing = [
            hand_paths.bind(NumberConfig(value=n), source, name=f"hand{n}") for n in range(3)
        ]
        return [*handing, train_toy.bind(TrainToyConfig(), name="train")]

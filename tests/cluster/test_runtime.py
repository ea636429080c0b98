"""Both runtimes give the same results; Ray's map and stream keep order and bounds.

`LocalRuntime` is the plain twin that `RayRuntime` is compared with.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster import training
from goldcrest.cluster.api import Output, Runtime, StepError, TrainingConfig
from goldcrest.cluster.pieces import Piece, cut
from goldcrest.cluster.runtime import LocalRuntime, RayRuntime, seed_everything
from tests.cluster.engine_steps import (
    CrashOnBatch,
    Doubler,
    crash_on_three,
    process_id,
    rows_of,
    square,
    thread_count,
)


def write_shards(folder: Path, sizes: list[int], row_group: int = 1 << 20) -> list[Path]:
    """Shards with a running column `x`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, start = [], 0
    for index, size in enumerate(sizes):
        path = folder / f"part-{index:05d}.parquet"
        pq.write_table(pa.table({"x": range(start, start + size)}), path, row_group_size=row_group)
        paths.append(path)
        start += size
    return paths


def runtimes() -> list[Runtime]:
    return [LocalRuntime(), RayRuntime()]


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
def test_map_keeps_order_and_raises_the_functions_own_error(
    ray_cluster: None, runtime: Runtime
) -> None:
    assert list(runtime.map(square, range(20))) == [i * i for i in range(20)]
    assert list(runtime.map(square, [])) == []
    results = runtime.map(crash_on_three, range(9), cpus=0.5)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="three is bad"):
        next(results)


def test_map_takes_items_only_as_fast_as_results_are_used(ray_cluster: None) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = RayRuntime().map(square, items())
    assert next(results) == 0
    assert len(taken) <= 2 * 2 + 1  # two CPU cores, twice as many calls in flight, one result used
    results.close()  # type: ignore[attr-defined]


def test_map_survives_a_killed_worker(ray_cluster: None, tmp_path: Path) -> None:
    assert list(RayRuntime().map(process_id, [str(tmp_path / "once"), ""], cpus=0.5)) == [1, 1]


def test_map_sets_threads_from_cpus(ray_cluster: None) -> None:
    assert list(RayRuntime().map(thread_count, [0], cpus=2)) == [("2", 2)]


@pytest.mark.parametrize("cpus", [0.5, 1.0])
def test_stream_on_ray_equals_the_local_one(ray_cluster: None, tmp_path: Path, cpus: float) -> None:
    shards = write_shards(tmp_path, [70, 0, 33, 10])
    arguments: dict[str, Any] = {"factor": 3}
    local = list(LocalRuntime().stream(shards, Doubler, arguments, batch_rows=16))
    remote = list(RayRuntime().stream(shards, Doubler, arguments, cpus=cpus, batch_rows=16))
    assert remote == local
    assert rows_of(iter(local))[0] == (0, 16)
    assert [x for x, _ in rows_of(iter(remote))] == [3 * i for i in range(113)]


def test_stream_raises_the_transforms_own_error(ray_cluster: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [40])
    with pytest.raises(ValueError, match="bad batch"):
        list(RayRuntime().stream(shards, CrashOnBatch, {"kind": "raise"}, cpus=0.5))


@pytest.mark.slow  # Ray tries for a quarter of a minute
def test_a_transform_that_always_crashes_ends_in_words(ray_cluster: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [40])
    with pytest.raises(StepError, match="lost again and again"):
        list(RayRuntime().stream(shards, CrashOnBatch, {"kind": "exit"}, cpus=0.5))


def test_stream_of_nothing_is_empty(ray_cluster: None) -> None:
    assert list(RayRuntime().stream([], Doubler, {"factor": 1})) == []


def test_work_that_can_never_be_placed_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3])
    with pytest.raises(StepError, match="declare cpus=0"):
        list(RayRuntime(held_cpus=2).stream(shards, Doubler, {"factor": 1}))
    with pytest.raises(StepError, match="1 GPUs per worker; the cluster has 0"):
        list(RayRuntime().map(square, [1], gpus=1))


def test_on_one_node_the_work_must_fit_beside_the_step(ray_cluster: None, tmp_path: Path) -> None:
    """What workers are given are paths of that node; elsewhere is no room for them."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    here = RayRuntime(held_cpus=1, node=node)
    assert list(here.map(square, range(5))) == [0, 1, 4, 9, 16]
    shards = write_shards(tmp_path, [40])
    with pytest.raises(StepError, match=r"stream asks for 2 CPU cores \(.* has 1\)") as caught:
        list(here.stream(shards, Doubler, {"factor": 1}, cpus=2))
    assert "labels" in str(caught.value.hint) and "folder" in str(caught.value.hint)
    with pytest.raises(StepError, match="map asks for 1 GPUs"):
        list(here.map(square, [1], gpus=1))
    out = Output(tmp_path / "out", runtime=here)
    with pytest.raises(StepError, match="train asks for 2 CPU cores"):  # both workers at once
        out.runtime.train("objective", TrainingConfig(workers=2), out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("runtime", "engine"),
    [(LocalRuntime(), "train_local"), (RayRuntime(), "train_on_ray")],
    ids=["local", "ray"],
)
def test_training_gets_scratch_and_seed_and_tells_the_output(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    engine: str,
) -> None:
    """The engine itself has tests of its own: here it is replaced by one that only reports."""
    asked: dict[str, Any] = {}
    noted: list[Any] = []

    def train(objective: Any, config: TrainingConfig, **given: Any) -> str:
        asked.update(given, objective=objective, config=config)
        given["on_log"]({"epoch": 0.0, "loss": 2.0})
        given["on_progress"](0.5, "epoch 1 of 2")
        return "trained"

    monkeypatch.setattr(training, engine, train)
    out = Output(
        tmp_path / "out",
        runtime=runtime,
        seed=7,
        scratch=tmp_path / "scratch",
        on_progress=lambda share, note: noted.append((share, note)),
        on_log=noted.append,
    )
    config = TrainingConfig(epochs=2)
    assert runtime.train("objective", config, out) == "trained"  # type: ignore[arg-type,comparison-overlap]
    assert (asked["objective"], asked["config"]) == ("objective", config)
    assert (asked["scratch"], asked["seed"]) == (tmp_path / "scratch", 7)
    assert noted == [{"epoch": 0.0, "loss": 2.0}, (0.5, "epoch 1 of 2")]


def test_training_that_can_never_be_placed_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    out = Output(tmp_path / "out", runtime=RayRuntime(held_cpus=2))
    with pytest.raises(StepError, match="train asks for 1 CPU cores per worker"):
        out.runtime.train("objective", TrainingConfig(), out)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=4),
    workers=st.integers(1, 5),
    batch_rows=st.integers(1, 17),
    row_group=st.integers(1, 50),
)
def test_batches_do_not_depend_on_workers_or_row_groups(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    workers: int,
    batch_rows: int,
    row_group: int,
) -> None:
    shards = write_shards(tmp_path_factory.mktemp("shards"), sizes, row_group)
    found = [
        batch.column("x").to_pylist()
        for piece in cut(shards, workers, batch_rows)
        for batch in piece.batches()
    ]
    start, expected = 0, []
    for size in sizes:
        rows = range(start, start + size)
        expected += [list(rows[i : i + batch_rows]) for i in range(0, size, batch_rows)]
        start += size
    assert found == expected


def test_few_shards_are_divided_among_the_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [100])
    pieces = cut(shards, 4, 10)
    assert [(p.first, p.rows) for p in pieces] == [(0, 30), (30, 30), (60, 30), (90, 10)]
    assert len(cut(shards * 8, 4, 10)) == 8
    assert isinstance(pieces[0], Piece)
    with pytest.raises(ValueError, match="at least 1"):
        cut(shards, 0, 10)


def test_all_global_generators_are_seeded() -> None:
    seed_everything(3)
    first = (random.random(), float(np.random.random()))
    seed_everything(3)
    assert (random.random(), float(np.random.random())) == first


def test_torch_is_seeded_whether_it_is_imported_before_or_after() -> None:
    """A worker that has torch already and a fresh one must draw the same numbers."""
    late = "from goldcrest.cluster.runtime import *; seed_everything(5); limit_threads(1)\n"
    say = "import torch; print(float(torch.rand(1)), torch.get_num_threads())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        ).stdout
        for code in (f"{late}{say}", f"import torch\n{late}{say}")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[1] == "1"

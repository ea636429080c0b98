"""Runs that are killed: the same command afterwards gives the bytes of an undisturbed run.

Each run is a process of its own that starts its own Ray, as a user's does. The short form kills the
worker of every step, and a driver; the long form (`slow`) ends drivers at instants drawn from fixed
seeds, evenly over the whole time of an undisturbed run: Python and Ray start, four steps, Ray ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.chaos import traces
from tests.chaos.traces import MARK
from tests.cluster.engine_steps import Chain, ChainConfig, NumberConfig

ROOT = Path(__file__).parents[2]
SEED = 20261121
SECONDS = 0.5  # that each of the four steps takes, where a run is to be ended in the middle
PROGRAM = """
import json, sys
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Chain, ChainConfig, NumberConfig

seconds = float(sys.argv[2])
config = ChainConfig(
    length=3,
    first=NumberConfig(value=2, seconds=seconds),
    rest=NumberConfig(value=1, seconds=seconds),
)
profile = Profile.model_validate({"ray": {"num_cpus": 2, "object_store_memory": "100MB"}})
result = run(Chain, config, store=Store.open(sys.argv[1]), profile=profile)
print(json.dumps(result.as_json()))
"""


def start(store: Path, seconds: float, mark: str = "run") -> subprocess.Popen[str]:
    """A run in a process of its own; `mark` is how `traces` finds what it started."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(store), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    """The result of a run that must succeed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    assert result["status"] == "succeeded"
    return result


def contents(store: Path) -> Mapping[str, object]:
    """Step -> checksums of its members; what a manifest says of time and place is left out.

    One manifest per key, and one key per step.
    """
    opened = Store.open(store)
    assert opened.verify() == []
    entries = list(opened.entries())
    assert len({m["key"] for m in entries}) == len(entries) == 4
    return {str(m["step"]): m["files"] for m in entries}


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, object]:
    """What an undisturbed run leaves; in this process, which has a Ray already."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    config = ChainConfig(length=3, first=NumberConfig(value=2), rest=NumberConfig(value=1))
    assert run(Chain, config, store=Store.open(store)).status == "succeeded"
    return contents(store)


def wait_for_step(store: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait until `count` steps have begun (their progress files are there)."""
    limit = time.monotonic() + 120
    while len(list(store.glob("runs/*/progress/*.jsonl"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "no step began within two minutes"
        time.sleep(0.02)


def kill_workers(store: Path, seen: set[Path]) -> None:
    """SIGKILL to the worker of every step that has begun and is not in `seen`, which grows."""
    for file in set(store.glob("runs/*/progress/*.jsonl")) - seen:
        first = file.read_text(encoding="utf-8").splitlines()[:1]
        if first:
            begin = json.loads(first[0])
            assert begin["kind"] == "begin"
            os.kill(begin["pid"], signal.SIGKILL)
            seen.add(file)


@pytest.mark.scenario("every step's worker is killed, and the driver; command repeated")
def test_killed_workers_and_a_killed_driver_change_nothing(
    tmp_path: Path, undisturbed: Mapping[str, object]
) -> None:
    """Ray's retries carry a run through the loss of workers, the same command through the rest."""
    store = tmp_path / "store"
    process = start(store, 1.0, str(store))
    seen: set[Path] = set()
    while not seen:
        wait_for_step(store, process, 1)
        kill_workers(store, seen)
    wait_for_step(store, process, 2)
    (first,) = [file.read_text() for file in seen]
    assert first.count('"begin"') == 2  # Ray ran it again
    assert len(traces.alive(str(store))) > 2  # the driver, its Ray, a worker
    process.kill()
    process.communicate()

    process = start(store, 1.0, str(store))
    before = set(store.glob("runs/*/progress/*.jsonl"))
    seen = set(before)
    while process.poll() is None:
        kill_workers(store, seen)
        time.sleep(0.05)
    steps = finish(process)["steps"]
    assert isinstance(steps, list)
    ran = [step["state"] for step in steps].count("ran")
    assert steps[0]["state"] == "cached"
    assert ran >= 2  # the second may have ended before its driver did
    assert [file.read_text().count('"begin"') for file in seen - before] == [2] * ran
    assert contents(store) == undisturbed
    assert traces.alive_after(str(store), 60.0) == {}


@pytest.fixture(scope="module")
def whole_time(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from the start to the end of an undisturbed run in a process of its own."""
    began = time.monotonic()
    finish(start(tmp_path_factory.mktemp("timed") / "store", SECONDS))
    return time.monotonic() - began


def ended_early(
    folder: Path, draw: random.Random, signals: list[signal.Signals], most: float
) -> Path:
    """The store of a run that a signal reached at an instant of [0, `most`); nothing of it lives.

    A run that was quicker than the one that was timed, and had ended, does not count: another store
    and another instant.
    """
    for attempt in range(10):
        store, mark = folder / f"store-{attempt}", f"{folder}-{attempt}"
        process = start(store, SECONDS, mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.0, most))
        running = process.poll() is None
        process.send_signal(draw.choice(signals))
        process.communicate(timeout=120)
        # Its Ray is its own: when its processes are gone, the cores are free again.
        assert traces.alive_after(mark, 60.0) == {}
        if running:
            return store
    raise AssertionError(f"no run of ten took {most:.1f} s")


def check_continues(store: Path, undisturbed: Mapping[str, object]) -> None:
    """The same command finishes the run: the same bytes, and after gc nothing besides."""
    finish(start(store, 0.0, str(store)))
    assert contents(store) == undisturbed
    Store.open(store).gc(grace=0.0)
    assert traces.left_over(store) == []
    assert traces.alive_after(str(store), 60.0) == {}


@pytest.mark.scenario(
    "the driver is killed (SIGKILL) at a random instant, and the command repeated"
)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_driver_killed_at_a_random_instant(
    tmp_path: Path, undisturbed: Mapping[str, object], whole_time: float, seed: int
) -> None:
    draw = random.Random(SEED + seed)
    check_continues(ended_early(tmp_path, draw, [signal.SIGKILL], whole_time), undisturbed)


@pytest.mark.scenario(
    "the driver gets SIGINT or SIGTERM at a random instant, and the command repeated"
)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_driver_interrupted_at_a_random_instant(
    tmp_path: Path, undisturbed: Mapping[str, object], whole_time: float, seed: int
) -> None:
    draw = random.Random(SEED - 1 - seed)
    signals = [signal.SIGINT, signal.SIGTERM]
    check_continues(ended_early(tmp_path, draw, signals, whole_time), undisturbed)


@pytest.mark.scenario("two processes run the same pipeline at once")
@pytest.mark.slow
def test_two_runs_of_two_processes_do_the_work_once(
    tmp_path: Path, undisturbed: Mapping[str, object]
) -> None:
    store = tmp_path / "store"
    both = [start(store, 1.0), start(store, 1.0)]
    states = []
    for process in both:
        steps = finish(process)["steps"]
        assert isinstance(steps, list)
        states += [step["state"] for step in steps]
    assert sorted(states) == ["cached"] * 4 + ["ran"] * 4
    assert contents(store) == undisturbed

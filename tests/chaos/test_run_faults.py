"""Runs that are killed: the same command afterwards gives the bytes of an undisturbed run.

Each run is a process of its own that starts its own Ray, as a user's does. The short form kills one
driver; the long form (`slow`) kills at many moments, drawn from a fixed seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Chain, ChainConfig, NumberConfig

ROOT = Path(__file__).parents[2]
SEED = 20261121
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


def start(store: Path, seconds: float) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(store), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    """Step -> checksums of its members; what a manifest says of time and place is left out."""
    opened = Store.open(store)
    assert opened.verify() == []
    return {str(m["step"]): m["files"] for m in opened.entries()}


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


@pytest.mark.scenario("the driver of a run is killed, and the command repeated")
def test_a_killed_driver_is_continued_by_the_same_command(
    tmp_path: Path, undisturbed: Mapping[str, object]
) -> None:
    store = tmp_path / "store"
    process = start(store, 1.0)
    wait_for_step(store, process, 2)
    process.kill()
    process.communicate()
    result = finish(start(store, 0.0))
    steps = result["steps"]
    assert isinstance(steps, list)
    assert steps[0]["state"] == "cached"
    assert contents(store) == undisturbed


@pytest.mark.scenario(
    "the driver is killed or interrupted at two random moments, and the command repeated"
)
@pytest.mark.slow
@pytest.mark.parametrize("moment", range(25))
def test_a_driver_killed_at_any_moment(
    tmp_path: Path,
    undisturbed: Mapping[str, object],
    moment: int,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("tried", 2)
    store = tmp_path / "store"
    draw = random.Random(SEED + moment)
    for _ in range(2):
        process = start(store, 0.5)
        if draw.random() < 0.7:
            wait_for_step(store, process, 1)
        time.sleep(draw.uniform(0.0, 3.0))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=120)
    finish(start(store, 0.0))
    assert contents(store) == undisturbed


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


@pytest.mark.scenario("every step's worker is killed in the middle of it")
@pytest.mark.slow
def test_workers_killed_again_and_again_while_a_run_goes_on(
    tmp_path: Path, undisturbed: Mapping[str, object]
) -> None:
    """Each step's first worker is killed in the middle; Ray's retries carry the run through."""
    store = tmp_path / "store"
    process = start(store, 1.0)
    killed: set[str] = set()
    while process.poll() is None and len(killed) < 4:
        for file in store.glob("runs/*/progress/*.jsonl"):
            first = file.read_text(encoding="utf-8").splitlines()[:1]
            if file.name not in killed and first:
                begin = json.loads(first[0])
                assert begin["kind"] == "begin"
                os.kill(begin["pid"], signal.SIGKILL)
                killed.add(file.name)
        time.sleep(0.05)
    finish(process)
    assert len(killed) == 4
    assert contents(store) == undisturbed

"""A node that is lost, with notice or without, costs time and nothing else.

Expected of every run: it succeeds, its artifacts are the bytes of an undisturbed run, there is one
manifest per key, nothing is left behind after gc, all CPU cores are free again within 60 s, and the
training has repeated no more than the steps since its last checkpoint. A
drained node does not touch the failure budget: that training may not fail once (`max_failures=0`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.lost_nodes import EPOCHS, STEPS

ROOT = Path(__file__).parents[2]


def lose(folder: Path, how: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The facts of every run of `lost_nodes.py`, the undisturbed one first."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos.lost_nodes", str(folder), how, *map(str, seeds)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "180"},
        capture_output=True,
        text=True,
        timeout=240 + 180 * len(seeds),
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def check(runs: list[dict[str, Any]], seeds: list[int]) -> None:
    """Every promise of every run."""
    assert [facts["seed"] for facts in runs] == [None, *seeds]
    for facts in runs:
        assert facts["status"] == "succeeded", facts
        assert facts["equal"], facts
        assert facts["manifests"] == facts["steps"] == 4, facts
        assert facts["damaged"] == [] and facts["left"] == [], facts
        assert facts["cpus_back"] is not None, facts
        # A checkpoint follows every epoch: what is lost, and trained again, is of one epoch.
        again = [steps - STEPS for steps in facts["trained"]]
        lost = 0 if facts["seed"] is None else STEPS
        assert len(again) == EPOCHS and min(again) == 0 and sum(again) <= lost, facts
        assert sum(steps > 0 for steps in again) <= 1, facts


@pytest.mark.scenario("a node is killed at a random second of a run")
@pytest.mark.parametrize(
    "seeds",
    [[1], pytest.param(list(range(2, 12)), marks=pytest.mark.timeout(2400))],
)
@pytest.mark.slow  # two minutes of two cores; the short form loses workers and drivers instead
def test_a_node_killed_at_a_random_second(
    tmp_path: Path, seeds: list[int], record_property: Any
) -> None:
    record_property("tried", len(seeds))
    check(lose(tmp_path, "kill", seeds), seeds)


@pytest.mark.slow
@pytest.mark.scenario("a node is drained and taken away while it trains; no failure allowed")
@pytest.mark.parametrize(
    "seeds",
    [[21], pytest.param(list(range(22, 26)), marks=pytest.mark.timeout(1200))],
)
def test_a_preempted_node_does_not_use_up_failures(
    tmp_path: Path, seeds: list[int], record_property: Any
) -> None:
    record_property("tried", len(seeds))
    check(lose(tmp_path, "drain", seeds), seeds)

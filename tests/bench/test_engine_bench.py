"""What the engine itself costs: whole processes, from the shell's point of view.

Targets of the first issue: a run of eight steps that are all cached within 3 s, a cold run of eight
steps that do nothing within 8 s (nearly all of it Ray's start). Quote medians of a quiet machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parents[1]


def seconds(folder: Path, *arguments: str) -> float:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "RAY_USAGE_STATS_ENABLED": "0"}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "goldcrest", *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def test_whole_process_times(tmp_path: Path) -> None:
    run = ("run", "bench.eight_steps", "--no-tracking", "--store")
    seconds(tmp_path, *run, "warm")  # byte-code and page cache
    cold = [seconds(tmp_path, *run, f"store-{n}") for n in range(3)]
    cached = [seconds(tmp_path, *run, "store-0") for _ in range(5)]
    plan = [seconds(tmp_path, "plan", "bench.eight_steps", "--store", "store-0") for _ in range(5)]
    bare = [bare_ray(tmp_path) for _ in range(3)]
    for name, found in (("cold", cold), ("cached", cached), ("plan", plan), ("bare Ray", bare)):
        print(f"{name:10s} median {statistics.median(found):5.2f} s, least {min(found):5.2f} s")
    assert statistics.median(cached) < 0.5 * statistics.median(cold)


def bare_ray(folder: Path) -> float:
    """The peer: Ray's start, eight chained no-op tasks, shutdown; nothing of ours."""
    code = (
        "import ray\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False,"
        " object_store_memory=100 << 20, log_to_driver=False)\n"
        "f = ray.remote(lambda x: x + 1)\n"
        "x = 0\n"
        "for _ in range(8): x = f.remote(x)\n"
        "assert ray.get(x) == 8\n"
        "ray.shutdown()\n"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - began

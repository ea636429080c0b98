"""A sweep whose driver is killed goes on from the store, whatever has become of Tune's state."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from goldcrest.cluster.store import Store
from goldcrest.cluster.sweep import sweep
from goldcrest.cluster.sweep_plan import SweepOptions
from goldcrest.cluster.sweep_space import Space
from tests.cluster import sweep_toys

ROOT = Path(__file__).resolve().parents[2]
METRIC = "verification.dense.eer"
RATES = {"learn.rate": {"grid": [0.3, 0.4, 0.5, 0.6]}}


def lines(path: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


@pytest.mark.scenario("the driver of a sweep is killed, and Tune's own state is damaged")
def test_a_killed_sweep_goes_on_from_the_store(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "space.yaml").write_text(json.dumps(RATES))
    tree = {
        "prefix": {"marks": str(marks)},
        "learn": {"marks": str(marks), "epochs": 5, "seconds": 0.3},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    said = (tmp_path / "said").open("w")
    driver = subprocess.Popen(
        [
            sys.executable, "-m", "goldcrest", "sweep", "tests.cluster.sweep_toys",
            "--config", tmp_path / "config.yaml", "--space", tmp_path / "space.yaml",
            "--search", "grid", "--metric", METRIC, "--parallel", "2", "--name", "killed",
            "--store", tmp_path / "store", "--no-tracking",
            "--address", ray.get_runtime_context().gcs_address,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=said,
    )  # fmt: skip
    said.close()
    record = tmp_path / "store" / "runs" / "killed"
    deadline = time.monotonic() + 240
    finished: list[object] = []
    while not finished and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        finished = [r["number"] for r in lines(record / "trials.jsonl") if r["metric"] is not None]
    assert finished, (tmp_path / "said").read_text()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(finished) < 4
    before = Counter(path.name.split("-")[0] for path in marks.iterdir())
    # Tune's own folder is damaged in every file; the torn last line of the record costs nothing.
    for path in record.glob("tune-*/**/*"):
        if path.is_file():
            path.write_bytes(b"\0 not what Tune wrote")
    with (record / "trials.jsonl").open("a") as stream:
        stream.write('{"number": 99, "conf')

    options = SweepOptions(metric=METRIC, search="grid", parallel=2)
    result = sweep(
        sweep_toys,
        tree,
        Space.parse(RATES),
        options,
        store=Store.open(tmp_path / "store"),
        name="killed",
    )
    assert result.status == "succeeded"
    errors = [trial.metric for trial in result.trials]
    assert errors == pytest.approx([(rate - 0.3) ** 2 for rate in RATES["learn.rate"]["grid"]])
    again = Counter(path.name.split("-")[0] for path in marks.iterdir()) - before
    assert "prefix" not in again
    assert "second" not in again
    # Two were running: Ray may start them once more before it notices that the driver is dead.
    assert again["learn"] <= 4 - len(finished) + 2
    for number in finished:
        states = result.trials[int(str(number))].steps
        assert set(states.values()) == {"cached"}
    assert not list(record.glob("tune-*"))

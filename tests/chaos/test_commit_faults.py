"""Faults between every pair of file operations of a computation, from lease to release.

The promise: after a kill or a full disk at any point, the artifact is complete or absent, nothing
is damaged, the next attempt gets through at once, and the garbage collector finds the rest.
"""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from goldcrest.cluster import checkpoints
from goldcrest.cluster.store import Store
from tests.chaos.commit_fault_process import write_checkpoints

KEY = hashlib.sha256(b"chaos").hexdigest()
LONG = (pytest.mark.slow, pytest.mark.timeout(1800))
SCRIPT = Path(__file__).with_name("commit_fault_process.py")
WORKER = """
import os, sys
from goldcrest.cluster.store import Store
store = Store.open(sys.argv[1])
for number in range(10000):
    key = f"{number:064x}"
    with store.lease(key, owner="victim", ttl=3600.0) as lease:
        if store.find(key) is None:
            folder = store.begin(key, lease)
            for name in ("a", "b", "c"):
                (folder / name).write_bytes(os.urandom(30000))
            store.commit(key, folder, {"step": "x"}, lease)
            print(key, flush=True)
"""


def strike(uri, fault, more=0):
    """Run the script; its report, one row per point of the fault."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), uri, fault, str(more)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[-1]["status"] == "done" and rows[-1]["operation"] is None
    return rows


def check_promise(store):
    """Complete or absent; the next attempt gets through without a wait; no garbage is left."""
    begun = time.monotonic()
    found = store.find(KEY)
    with store.lease(KEY, owner="heir", ttl=3600.0) as lease:
        assert time.monotonic() - begun < 60.0
        artifact = store.find(KEY)
        assert (artifact is None) == (found is None)
        if artifact is None:
            folder = store.begin(KEY, lease)
            (folder / "deep").mkdir()
            (folder / "a.txt").write_text("alpha")
            (folder / "deep" / "b.txt").write_text("beta")
            artifact = store.commit(KEY, folder, {"step": "x"}, lease)
    assert artifact.file("a.txt").read_text() == "alpha"
    assert artifact.file("deep/b.txt").read_text() == "beta"
    assert store.quarantined() == []
    store.gc(grace=0.0)
    assert list((store.root / "tmp").iterdir()) == []
    assert not (store.root / "scratch").exists() or not list((store.root / "scratch").iterdir())
    assert store.verify() == []
    return found is not None


@pytest.mark.scenario("a commit is killed between any two file operations")
@pytest.mark.parametrize("more", [0, *(pytest.param(n, marks=LONG) for n in range(10, 70, 10))])
def test_kill_between_any_two_file_operations(tmp_path, record_property, more):
    """The long form's artifacts have up to 62 files: more than a thousand points together."""
    rows = strike(str(tmp_path), "kill", more)
    record_property("tried", len(rows) - 1)  # the last one ran undisturbed
    assert len(rows) > 20
    assert {row["status"] for row in rows[:-1]} == {"killed"}
    there = [check_promise(Store.open(tmp_path / str(row["n"]))) for row in rows]
    commit_point = there.index(True)
    assert commit_point > 0 and all(there[commit_point:])  # one point, before nothing, then all
    assert rows[commit_point - 1]["operation"].startswith("os.rename")


@pytest.mark.scenario("a training is killed between any two file operations of a checkpoint")
def test_kill_while_a_checkpoint_is_written(tmp_path, record_property):
    rows = strike(str(tmp_path), "checkpoint-kill")
    record_property("tried", len(rows) - 1)  # the last one ran undisturbed
    assert len(rows) > 10
    assert {row["status"] for row in rows[:-1]} == {"killed"}
    epochs = []
    for row in rows:
        scratch = tmp_path / str(row["n"])
        found = checkpoints.latest(scratch)
        epochs.append(found.position.epoch)
        assert found.piece("weight", "w", 0, 6).tolist() == [float(epochs[-1])] * 6
        write_checkpoints(scratch, 3)  # the training goes on
        assert checkpoints.latest(scratch).position.epoch == 3
        names = [path.name for path in checkpoints.folder_of(scratch).iterdir()]
        assert sorted(names) == ["epoch-00002", "epoch-00003"]
    commit_point = epochs.index(3)
    assert set(epochs[:commit_point]) == {2} and set(epochs[commit_point:]) == {3}
    assert rows[commit_point - 1]["operation"].startswith("os.rename")


@pytest.mark.scenario("the disk is full at any file operation of a commit")
def test_full_disk_at_any_file_operation(tmp_path, record_property):
    rows = strike(str(tmp_path), "full")
    record_property("tried", len(rows) - 1)  # the last one ran undisturbed
    assert len(rows) > 5
    for row in rows[:-1]:
        # In the step's own writing it is still the step's OSError; in the store's it is told.
        told = row["status"] == "done" or "No space left" in row["status"]
        assert told, row
        store = Store.open(tmp_path / str(row["n"]))
        check_promise(store)
    assert any(row["status"].startswith("StoreError") for row in rows)
    assert all("artifacts gc" in r["status"] for r in rows if r["status"].startswith("StoreError"))


@pytest.mark.scenario("a commit to a bucket is killed around any operation")
@pytest.mark.parametrize("more", [0, pytest.param(20, marks=LONG)])
def test_kill_around_any_operation_on_a_bucket(tmp_path, monkeypatch, record_property, more):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    uri = f"local://{tmp_path}/bucket"
    rows = strike(uri, "bucket-kill", more)
    record_property("tried", len(rows) - 1)  # the last one ran undisturbed
    assert len(rows) > 20
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another host"))
    there = [check_promise(Store.open(f"{uri}/{row['n']}")) for row in rows]
    commit_point = there.index(True)
    assert commit_point > 0 and all(there[commit_point:])
    assert rows[commit_point]["operation"] == "after put"
    assert rows[commit_point - 1]["operation"] == "after _write"  # written aside, not yet moved
    for row in rows:
        names = Store.open(f"{uri}/{row['n']}").bucket.times("", recursive=True)
        assert all(name.startswith("artifacts/") for name in names), names
        assert not any(name.endswith(".part") for name in names)


@pytest.mark.scenario("a process that commits is killed at random moments")
def test_sigkill_at_random_moments(tmp_path, record_property):
    """Workers killed in the middle of whatever they do; what they committed is whole."""
    record_property("tried", 12)
    moments, told = random.Random(7), []
    for _ in range(12):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE
        )
        told += [worker.stdout.readline().decode().strip() for _ in range(moments.randint(1, 3))]
        time.sleep(moments.uniform(0.0, 0.03))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    store = Store.open(tmp_path)
    keys = [entry["key"] for entry in store.entries()]
    assert keys == [f"{number:064x}" for number in range(len(keys))]
    assert len(told) >= 12 and set(told) <= set(keys)  # what was said to be there is there
    assert store.verify() == [] and store.quarantined() == []
    store.gc(grace=0.0)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.scenario("garbage collection is killed, or its disk fails, in the middle")
@pytest.mark.parametrize("fault", ["kill", "io error"])
def test_fault_while_garbage_is_collected(tmp_path, fault, monkeypatch):
    """A collector that dies in the middle of a removal leaves no half artifact to readers."""
    store = Store.open(tmp_path)
    with store.lease(KEY, owner="a") as lease:
        folder = store.begin(KEY, lease)
        for number in range(5):
            (folder / str(number)).write_text("x")
        store.commit(KEY, folder, {"step": "x"}, lease)
    code = (
        "import sys, os, shutil\n"
        "from goldcrest.cluster.store import Store\n"
        "removed = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'os.remove':\n"
        "        removed.append(arguments)\n"
        "        if len(removed) == 3:\n"
        f"            {'os.kill(os.getpid(), 9)' if fault == 'kill' else 'raise OSError(5)'}\n"
        "sys.addaudithook(hook)\n"
        "Store.open(sys.argv[1]).gc(set())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode != 0
    assert store.find(KEY) is None and store.quarantined() == []
    store.gc()
    assert list((tmp_path / "tmp").iterdir()) == []

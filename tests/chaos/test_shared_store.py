"""A node that does not see the store is named before a step runs.

The nodes are real; the second one lives in a mount namespace of its own, where an empty disk lies
over the store's folder: what a forgotten NFS mount looks like.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.shared_store import View, look, prove_shared
from goldcrest.cluster.store import Store

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, signal, subprocess, sys, time
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Chain, ChainConfig

folder = Path(sys.argv[1])
memory = {"object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
store = Store.open(folder / "store")
told = {}
result = run(Chain, ChainConfig(length=1), store=store)
told["one node"] = result.status
second = cluster.add_node(num_cpus=1, **memory)
cluster.wait_for_nodes()
result = run(Chain, ChainConfig(length=2), store=store)
told["two nodes"] = result.status
told["left"] = sorted(path.name for path in folder.rglob(".seen*"))
cluster.remove_node(second)
hide = 'mount -t tmpfs none "$0" && exec "$@"'
raylet = subprocess.Popen(
    ["unshare", "-m", "sh", "-c", hide, str(folder), sys.executable, "-m", "ray.scripts.scripts",
     "start", "--address", cluster.address, "--num-cpus", "1", "--block",
     "--object-store-memory", str(100 << 20)],
    stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True,
)

limit = time.monotonic() + 180
while sum(node["Alive"] for node in ray.nodes()) < 2:
    assert time.monotonic() < limit and raylet.poll() is None
    time.sleep(0.5)
try:
    run(Chain, ChainConfig(length=3), store=store)
except InputError as error:
    told["message"], told["hint"] = error.message, error.hint
told["begun"] = len(list(folder.rglob("progress/*")))
print(json.dumps(told), flush=True)
os.killpg(raylet.pid, signal.SIGTERM)
raylet.wait(60)
ray.shutdown()
cluster.shutdown()
"""


def can_hide_folders() -> bool:
    """Whether this user may make mount namespaces."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True
    )
    return tried.returncode == 0


@pytest.mark.slow  # its parts, one by one, are below
@pytest.mark.scenario("a node does not see the store")
@pytest.mark.skipif(not can_hide_folders(), reason="mount namespaces need privileges")
def test_a_node_with_another_disk_in_the_store_s_place_is_named(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "180"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert (told["one node"], told["two nodes"]) == ("succeeded", "succeeded")
    assert told["left"] == []
    assert "1 of 2 nodes do not see the store" in told["message"]
    assert "it has no folder" in told["message"]
    assert "mount the same folder" in told["hint"]
    assert told["begun"] == 3  # those of the two runs that were allowed, two of them cached


def test_one_node_needs_no_proof(ray_cluster: None, store_folder: Path) -> None:
    store = Store.open(store_folder)
    assert prove_shared(store, store.run_folder("one")) == []


def test_what_a_node_says(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's own part, on folders as different nodes would find them."""
    monkeypatch.setattr("goldcrest.cluster.shared_store._PATIENCE", 0.3)
    store = Store.open(store_folder)
    folder = store.run_folder("one")
    (folder / ".seen-1-nonce").write_text("abc")
    seen = look("n1", store.uri, folder, "seen-1", "abc")
    assert (seen.problem, seen.sees_run) == ("", False)
    assert (folder / ".seen-1-n1").read_text() == "abc"
    (folder / ".seen-1-run").touch()
    assert look("n1", store.uri, folder, "seen-1", "abc").sees_run
    other = look("n2", store.uri, tmp_path, "seen-1", "abc")
    assert other.problem == "it lacks what was written there a moment ago"
    stale = look("n2", store.uri, folder, "seen-1", "of another run")
    assert "it lacks" in stale.problem
    assert "it has no folder" in look("n3", store.uri, tmp_path / "no", "seen-1", "abc").problem


@pytest.mark.parametrize("lost", [True, False])
def test_only_a_node_that_is_still_there_can_stop_a_run(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """A node that is killed while a run starts is lost like any other: no reason to refuse it."""
    both = {"n1": "one", "n2": "two"}
    seen = iter([both, {"n1": "one"} if lost else both])

    def answers(nodes: list[str], uri: str, folder: Path, name: str, nonce: str) -> list[View]:
        gone = View(node="n2", problem="the node doesn't exist any more", sees_run=True)
        return [look("n1", uri, folder, name, nonce), gone]

    monkeypatch.setattr("goldcrest.cluster.shared_store._living_nodes", lambda: next(seen))
    monkeypatch.setattr("goldcrest.cluster.shared_store._ask_all", answers)
    store = Store.open(store_folder)
    folder = store.run_folder("one")
    if lost:
        assert prove_shared(store, folder) == []
    else:
        with pytest.raises(InputError, match=r"1 of 2 nodes do not see.*two: the node doesn't"):
            prove_shared(store, folder)
    assert list(store_folder.rglob(".seen*")) == []


def test_a_bucket_is_seen_and_one_that_refuses_is_a_problem(s3_uri: str, tmp_path: Path) -> None:
    from goldcrest.cluster.store_bucket import Bucket

    bucket = Bucket.at(s3_uri)
    bucket.put("seen/seen-1/nonce", b"abc")
    seen = look("n1", s3_uri, tmp_path, "seen-1", "abc")
    assert (seen.problem, seen.sees_run) == ("", False)
    assert bucket.get("seen/seen-1/n1") == b"abc"
    away = look(
        "n1", s3_uri.replace("endpoint_override=", "endpoint_override=x"), tmp_path, "s", "a"
    )
    assert away.problem
    assert "not-a-secret" not in away.problem

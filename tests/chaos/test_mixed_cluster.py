"""A real cluster of several nodes: what a profile says of pools and GPUs is where steps run.

One of the nodes is killed under a step here; the long form (`test_lost_nodes.py`) loses nodes at
any instant, of a training too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import ray
from ray.cluster_utils import Cluster
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.chaos.traces import left_over
from tests.cluster.engine_steps import Chain, ChainConfig, NumberConfig, Pools, PoolsConfig

memory = {"object_store_memory": 100 << 20}
gpu = {"num_cpus": 1, "num_gpus": 1, "labels": {"pool": "gpu"}, **memory}
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"pool": "cpu"}, **memory}
)
working = cluster.add_node(**gpu)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

def profile(**steps):
    return Profile.model_validate({"steps": steps})

on_cpu, on_gpu = {"labels": {"pool": "cpu"}}, {"labels": {"pool": "gpu"}}
store = Store.open(f"{sys.argv[1]}/placed")
pools = profile(**{"*": on_cpu, "train*": on_gpu, "hold*": {"gpus": 1, **on_gpu}})
result = run(Pools, PoolsConfig(), store=store, profile=pools)
places = {step.name: store.find(step.key).json("places") for step in result.steps}
placed = {"places": places, "status": result.status}

def chain(seconds):
    rest = NumberConfig(value=1, seconds=seconds)
    return ChainConfig(length=2, first=NumberConfig(value=2), rest=rest)

def files(store):
    return [[entry["step"], entry["files"]] for entry in store.entries()]

calm, store = (Store.open(f"{sys.argv[1]}/{name}") for name in ("calm", "lost"))
run(Chain, chain(0.0), store=calm, profile=profile(**{"*": on_cpu}))
with ThreadPoolExecutor(1) as other:  # nodes can only be started from the main thread
    all_on_gpu = profile(**{"*": on_gpu})
    running = other.submit(run, Chain, chain(3.0), store=store, profile=all_on_gpu)
    while len(list(store.root.glob("runs/*/progress/*.jsonl"))) < 2 and not running.done():
        time.sleep(0.02)
    begun = not running.done()
    cluster.remove_node(working, allow_graceful=False)
    cluster.add_node(**gpu)
    result = running.result()
attempts = [
    file.read_text().count('"begin"') for file in store.root.glob("runs/*/progress/*.jsonl")
]
store.gc(grace=0.0)
limit = time.monotonic() + 60
while (free := ray.available_resources().get("CPU")) != 2 and time.monotonic() < limit:
    time.sleep(0.2)
lost = {
    "status": result.status, "error": result.error and result.error.message, "begun": begun,
    "equal": sorted(files(store)) == sorted(files(calm)), "keys": len(files(store)),
    "damaged": store.verify(), "left": left_over(store.root), "attempts": attempts, "free": free,
}
print(json.dumps({"placed": placed, "lost": lost}))
ray.shutdown()
cluster.shutdown()
"""


def ended(program: str, folder: Path, **more: str) -> dict[str, Any]:
    """What a program that makes a cluster of its own printed last."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_raylet_start_wait_time_s": "180",  # the machine may be busy
            **more,
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


BUCKET = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Paths, PoolsConfig

folder = sys.argv[1]

def node(name, cpus):
    # Every machine has a cache of its own, as on a real cluster.
    cache = {"GOLDCREST_CACHE": f"{folder}/cache-{name}"}
    return {"num_cpus": cpus, "labels": {"pool": name}, "env_vars": cache,
            "object_store_memory": 100 << 20}

cluster = Cluster(initialize_head=True, head_node_args=node("head", 0))
cluster.add_node(**node("cpu", 1))
cluster.add_node(**node("gpu", 1))
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
store = Store.open(f"local://{folder}/bucket")
result = run(Paths, PoolsConfig(), store=store)
names = [step.name for step in result.steps if step.name != "number" and step.state == "ran"]
places = {s.name: store.find(s.key).json("places") for s in result.steps if s.name in names}
error = result.error and result.error.message
print(json.dumps({"places": places, "status": result.status, "error": error}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow  # placement of one step is in tests/cluster/test_runtime.py and test_profile.py
def test_with_a_bucket_the_workers_of_a_step_stay_on_its_node(tmp_path: Path) -> None:
    """And no such step begins on the head, which offers no core to them."""
    found = ended(BUCKET, tmp_path, GOLDCREST_CACHE=str(tmp_path / "cache-driver"))
    assert found["status"] == "succeeded", found["error"]
    places = found["places"]
    for name in ("hand0", "hand1", "hand2"):
        own = places[name]["own"]
        assert own in ("cpu", "gpu")
        assert places[name] == {"own": own, "map": [own], "stream": [own]}
    own = places["train"]["own"]
    assert places["train"] == {
        "own": own, "map": [own], "trained_on_gpu_node": float(own == "gpu"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened on a cluster of a CPU node and one with a (pretended) GPU."""
    return ended(PROGRAM, tmp_path_factory.mktemp("cluster"))


def test_steps_land_where_the_profile_says(found: dict[str, Any]) -> None:
    placed = found["placed"]
    assert placed["status"] == "succeeded"
    places = placed["places"]
    assert places["train"] == {"own": "gpu", "map": ["gpu"], "trained_on_gpu_node": 1.0}
    assert places["look"] == {"own": "cpu"}
    assert places["hold"] == {"own": "gpu"}


@pytest.mark.scenario("the node under a step is killed, and replaced")
def test_a_node_killed_under_a_step_costs_that_step_s_time(found: dict[str, Any]) -> None:
    lost = found["lost"]
    assert lost["begun"] and lost["status"] == "succeeded", lost["error"]
    assert lost["equal"] and lost["keys"] == 3
    assert lost["damaged"] == [] and lost["left"] == []
    assert sorted(lost["attempts"]) == [1, 1, 2]
    assert lost["free"] == 2  # all cores were given back

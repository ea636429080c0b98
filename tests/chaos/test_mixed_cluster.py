"""A real cluster of several nodes: what a profile says of pools and GPUs is where steps run."""

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
import json, sys
import ray
from ray.cluster_utils import Cluster
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Pools, PoolsConfig

memory = {"object_store_memory": 100 << 20}
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"pool": "cpu"}, **memory}
)
cluster.add_node(num_cpus=1, num_gpus=1, labels={"pool": "gpu"}, **memory)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
profile = Profile.model_validate(
    {
        "steps": {
            "*": {"labels": {"pool": "cpu"}},
            "train*": {"labels": {"pool": "gpu"}},
            "hold*": {"gpus": 1, "labels": {"pool": "gpu"}},
        }
    }
)
store = Store.open(sys.argv[1])
result = run(Pools, PoolsConfig(), store=store, profile=profile)
places = {step.name: store.find(step.key).json("places") for step in result.steps}
print(json.dumps({"places": places, "status": result.status}))
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


def test_steps_land_where_the_profile_says(tmp_path: Path) -> None:
    found = ended(PROGRAM, tmp_path / "store")
    assert found["status"] == "succeeded"
    places = found["places"]
    assert places["train"] == {"own": "gpu", "map": ["gpu"], "trained_on_gpu_node": 1.0}
    assert places["look"] == {"own": "cpu"}
    assert places["hold"] == {"own": "gpu"}

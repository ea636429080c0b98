"""A real cluster of several nodes: what a profile says of pools and GPUs is where steps run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_steps_land_where_the_profile_says(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["status"] == "succeeded"
    places = found["places"]
    assert places["train"] == {"own": "gpu", "map": ["gpu"], "trained_on_gpu_node": 1.0}
    assert places["look"] == {"own": "cpu"}
    assert places["hold"] == {"own": "gpu"}

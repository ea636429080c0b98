"""A program for the tests: runs on a real cluster of three nodes, one of which is lost in each run.

    python lost_nodes.py FOLDER kill|drain SEED...  ->  one line of JSON per run

The first run is undisturbed; the others must equal it. `kill` is SIGKILL to the raylet of one of
the two nodes that work, at a random second of the time that the first run took. `drain` is the
notice that a spot machine gets, to the node that trains, with the kill a few seconds later. A lost
node is replaced, as an autoscaler would.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    Output,
    TrainingConfig,
    task,
)
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.chaos.traces import left_over
from tests.cluster.engine_steps import NumberConfig, number, total
from tests.cluster.training_toys import NoNoise

NOTICE = 4.0  # seconds between the notice and the loss of a drained node
MEMORY = {"object_store_memory": 100 << 20}
POOL = {"num_cpus": 1, "labels": {"pool": "spot"}, **MEMORY}


EPOCHS, STEPS = 12, 4  # of the training; 48 examples in batches of 12


class LearnConfig(Config):
    """A training that a lost node interrupts; `log` is a file for the steps that it really took."""

    log: Annotated[str, DoesNotChangeResult] = ""
    training: TrainingConfig = TrainingConfig(
        epochs=EPOCHS, batch_size=12, learning_rate=0.01, max_failures=0, max_preemptions=-1
    )


class Slow(NoNoise):
    """Takes its time over every step, so that a kill falls into it; logs the epoch of each."""

    def __init__(self, log: str) -> None:
        self.log = Path(log)

    def losses(self, model: Any, batch: Any, *, epoch: int) -> Any:
        """The toy's."""
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{epoch}\n")
        return super().losses(model, batch, epoch=epoch)

    def after_step(self, model: Any, whole: Any) -> None:
        """Wait."""
        time.sleep(0.2)


@task(cpus=0)
def learn(cfg: LearnConfig, first: Artifact, out: Output) -> None:
    """Train, and keep the weights."""
    trained = out.runtime.train(Slow(cfg.log), cfg.training, out)
    out.tensors("weights", trained.model_state)
    out.json("history", trained.history)


class LostConfig(Config):
    """How often a training may fail, and where it logs its steps."""

    max_failures: int = 3
    log: Annotated[str, DoesNotChangeResult] = ""


class Lost:
    """Two slow numbers, their sum, and a training, all on the pool that loses a node."""

    Config = LostConfig

    @staticmethod
    def build(cfg: LostConfig) -> Any:
        """number, number -> total; number -> learn."""
        one = number.bind(NumberConfig(value=1, seconds=2.0), name="one")
        two = number.bind(NumberConfig(value=2, seconds=3.0), name="two")
        training = LearnConfig().training.model_copy(update={"max_failures": cfg.max_failures})
        learned = learn.bind(LearnConfig(training=training, log=cfg.log), one, name="learn")
        return [total.bind(NumberConfig(value=3), one, name="sum", further=two), learned]


def contents(store: Store) -> dict[str, Any]:
    """Step -> checksums of its members."""
    return {str(entry["step"]): entry["files"] for entry in store.entries()}


def steps_by_epoch(log: Path) -> list[int]:
    """How many steps of each epoch the training took, those that were lost too."""
    taken = Counter(int(line) for line in log.read_text(encoding="utf-8").split())
    return [taken[epoch] for epoch in range(EPOCHS)]


def cpus_back(seconds: float) -> float | None:
    """After how many seconds all CPUs were free again, None if not within `seconds`."""
    import ray

    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU"):
            return round(time.monotonic() - began, 1)
        time.sleep(0.5)
    return None


def training_node(cluster: Any, nodes: list[Any], root: Path) -> Any:
    """The node on which the training runs, once it is past its first epoch: the one that is busy.

    The other steps take 3 s and have long ended by then; the node's free cores say so too.
    """
    from ray._private.state import available_resources_per_node

    limit = time.monotonic() + 180
    while time.monotonic() < limit:
        told = "".join(file.read_text() for file in root.glob("runs/*/progress/learn.jsonl"))
        free = available_resources_per_node()
        busy = [node for node in nodes if free.get(node.node_id, {}).get("CPU", 0.0) < 1.0]
        if '"kind": "log"' in told and len(busy) == 1:
            return busy[0]
        time.sleep(0.1)
    raise AssertionError("the training did not begin within three minutes")


def drain(cluster: Any, node: Any) -> None:
    """Give the notice of a preemption, and wait until it has run out."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    deadline = int((time.time() + NOTICE) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=cluster.address)
    accepted, why = client.drain_node(node.node_id, reason, "taken back", deadline)
    assert accepted, why
    time.sleep(NOTICE)


def replace(cluster: Any, nodes: list[Any], node: Any) -> None:
    """Kill a node of the pool and put a new one in its place."""
    nodes.remove(node)
    cluster.remove_node(node, allow_graceful=False)
    nodes.append(cluster.add_node(**POOL))


def main() -> None:
    """Run undisturbed once, then once per seed with a node lost."""
    import ray
    from ray.cluster_utils import Cluster

    folder, how, seeds = Path(sys.argv[1]), sys.argv[2], [int(text) for text in sys.argv[3:]]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            **MEMORY,
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
        },
    )
    nodes = [cluster.add_node(**POOL) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    profile = Profile.model_validate({"steps": {"*": {"labels": {"pool": "spot"}}}})
    wanted, longest = None, 0.0
    for seed in [None, *seeds]:
        store = Store.open(folder / f"store-{seed}")
        log = folder / f"steps-{seed}.txt"
        config = LostConfig(max_failures=0 if how == "drain" else 3, log=str(log))
        draw = random.Random(seed)
        moment = draw.uniform(0.0, longest)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as other:  # nodes can only be started from the main thread
            running = other.submit(run, Lost, config, store=store, profile=profile)
            if seed is not None and how == "kill":
                time.sleep(moment)
                replace(cluster, nodes, draw.choice(nodes))
            elif seed is not None:
                node = training_node(cluster, nodes, store.root)
                drain(cluster, node)
                replace(cluster, nodes, node)
            result = running.result()
        seconds = round(time.monotonic() - began, 1)
        longest = longest or seconds
        damaged = store.verify()
        store.gc(grace=0.0)
        made = contents(store)
        wanted = wanted or made
        facts = {
            "seed": seed,
            "moment": round(moment, 1),
            "seconds": seconds,
            "status": result.status,
            "error": result.error and result.error.message,
            "equal": made == wanted,
            "manifests": len(list(store.entries())),
            "steps": len(result.steps),
            "damaged": damaged,
            "left": left_over(store.root),
            "cpus_back": cpus_back(60.0),
            "trained": steps_by_epoch(log),
        }
        print(json.dumps(facts), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    # Tasks travel to workers by the name of their module, and there `__main__` is another one.
    from tests.chaos import lost_nodes

    lost_nodes.main()

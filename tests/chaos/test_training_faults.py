"""Killed processes in training: the result is that of an undisturbed run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from goldcrest.cluster import checkpoints
from goldcrest.cluster.api import Trained
from goldcrest.cluster.training import train_local, train_on_ray
from goldcrest.cluster.training_config import TrainingConfig

TOYS = Path(__file__).parents[1] / "cluster" / "training_toys.py"


@pytest.fixture(scope="module")
def toys() -> Iterator[ModuleType]:
    """The toy objectives, sent to workers by value: workers cannot import this folder."""
    from ray import cloudpickle

    spec = importlib.util.spec_from_file_location("training_toys_chaos", TOYS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_toys_chaos"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules["training_toys_chaos"]


def config(**changes: object) -> TrainingConfig:
    base = {"epochs": 5, "batch_size": 12, "learning_rate": 0.01, "weight_decay": 0.05}
    return TrainingConfig(**(base | changes))  # type: ignore[arg-type]


def assert_close(one: Trained, two: Trained) -> None:
    """Equal up to the order of sums over workers: 1e-5 on losses, 1e-4 on weights."""
    for a, b in zip(one.history, two.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for name, value in one.model_state.items():
        torch.testing.assert_close(two.model_state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.scenario("one of two training workers is killed, ZeRO 3")
def test_a_killed_worker_is_replaced_and_the_training_goes_on(
    ray_cluster: None, toys: ModuleType, tmp_path: Path
) -> None:
    """SIGKILL to one of two workers in epoch 2 under ZeRO 3; in the end another world size, one
    worker without ZeRO, goes on from their last checkpoint but one."""
    whole = train_local(toys.NoNoise(), config(), scratch=tmp_path / "whole", seed=5)
    flag, folder = tmp_path / "killed", tmp_path / "killed-run"
    trained = train_on_ray(
        toys.Killed(flag),
        config(workers=2, zero_stage=3, max_failures=2),
        scratch=folder,
        seed=5,
    )
    assert flag.exists()
    assert_close(whole, trained)

    shutil.rmtree(checkpoints.folder_after(folder, 5))
    assert_close(whole, train_local(toys.NoNoise(), config(), scratch=folder, seed=5))
    shards = [len(list(checkpoints.folder_after(folder, k).glob("shard-*"))) for k in (4, 5)]
    assert shards == [2, 1]  # it went on after epoch 4: from the beginning, both would be one's


DRIVER = """
import importlib.util, sys, time
from pathlib import Path
from goldcrest.cluster.api import Trained
from goldcrest.cluster.training import train_local
from goldcrest.cluster.training_config import TrainingConfig
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
class Slow(toys.Toy):
    def after_step(self, model, whole):
        time.sleep(0.02)
config = TrainingConfig(epochs=30, batch_size=12, learning_rate=0.01)
train_local(Slow(), config, scratch=Path(sys.argv[2]), seed=5)
"""


@pytest.mark.scenario("a training process is killed, and continued")
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_process_continues_to_the_same_bytes(
    toys: ModuleType, tmp_path: Path, after: int
) -> None:
    """SIGKILL at any instant, also while a checkpoint is written: bitwise the undisturbed run."""
    settings = config(epochs=30, weight_decay=0.0)
    whole = train_local(toys.Toy(), settings, scratch=tmp_path / "whole", seed=5)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(TOYS), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ended = time.monotonic() + 120
    while not checkpoints.folder_after(folder, after).exists():
        assert process.poll() is None and time.monotonic() < ended, process.communicate()
        time.sleep(0.005)
    time.sleep(0.037 * after)  # somewhere inside a later epoch or its checkpoint
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    trained = train_local(toys.Toy(), settings, scratch=folder, seed=5)
    assert trained.history == whole.history
    for name, value in whole.model_state.items():
        assert torch.equal(value, trained.model_state[name])

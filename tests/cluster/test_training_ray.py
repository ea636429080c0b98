"""The training engine on Ray Train: two workers, an error of the objective, another worker count."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from goldcrest.cluster import checkpoints
from goldcrest.cluster.errors import StepError
from goldcrest.cluster.training import train_local, train_on_ray
from goldcrest.cluster.training_config import TrainingConfig
from goldcrest.cluster.training_ray import _is_echo


@pytest.fixture(scope="module")
def toys() -> Iterator[ModuleType]:
    """The toy objectives, sent to workers by value: workers cannot import this folder."""
    from ray import cloudpickle

    path = Path(__file__).with_name("training_toys.py")
    spec = importlib.util.spec_from_file_location("training_toys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["training_toys"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules["training_toys"]


def config(**changes: Any) -> TrainingConfig:
    base = {"epochs": 4, "batch_size": 12, "learning_rate": 0.01, "weight_decay": 0.05}
    return TrainingConfig(**(base | changes))


def assert_close(one: Any, two: Any) -> None:
    """Equal up to the order of sums: 1e-5 on losses, 1e-4 on weights, after 16 steps."""
    for a, b in zip(one.history, two.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for name, value in one.model_state.items():
        torch.testing.assert_close(two.model_state[name], value, rtol=1e-4, atol=1e-6)


def test_one_worker_gives_the_bytes_of_this_process(
    ray_cluster: None, toys: ModuleType, tmp_path: Path
) -> None:
    rows: list[Any] = []
    here = train_local(toys.Toy(), config(), scratch=tmp_path / "here", seed=5)
    there = train_on_ray(
        toys.Toy(), config(), scratch=tmp_path / "there", seed=5, on_log=rows.append
    )
    assert here.history == there.history == rows
    for name, value in here.model_state.items():
        assert torch.equal(value, there.model_state[name])
    again = train_on_ray(toys.Wrong(None), config(), scratch=tmp_path / "there", seed=5)
    assert again.history == there.history  # finished: nothing was started


def test_an_error_of_the_objective_is_not_repeated_and_another_worker_count_goes_on(
    ray_cluster: None, toys: ModuleType, tmp_path: Path
) -> None:
    """Two workers under ZeRO 2 fail in epoch 2; one worker without ZeRO finishes the training."""
    here = train_local(toys.NoNoise(), config(), scratch=tmp_path / "here", seed=5)
    folder, tries = tmp_path / "there", tmp_path / "tries"
    two = config(workers=2, zero_stage=2)
    with pytest.raises(StepError, match=r"ValueError in losses\(\).*the labels are not what they"):
        train_on_ray(toys.Wrong(tries), two, scratch=folder, seed=5)
    assert len(tries.read_text("utf-8").split()) <= 2  # once per worker
    names = sorted(p.name for p in checkpoints.folder_of(folder).glob("epoch-*"))
    assert names == ["epoch-00001", "epoch-00002"]
    assert len(list((checkpoints.folder_after(folder, 2)).glob("shard-*"))) == 2
    assert_close(here, train_local(toys.NoNoise(), config(), scratch=folder, seed=5))


def test_which_errors_are_another_workers_death() -> None:
    assert _is_echo(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert _is_echo(ConnectionResetError("by peer")) and _is_echo(OSError("No space left"))
    assert not _is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not _is_echo(StepError("the loss is not finite: connection closed"))
    assert not _is_echo(ValueError("gloo"))

"""The training engine on Ray Train: its bytes, an error of the objective, another worker count."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from goldcrest.cluster import checkpoints, training_ray
from goldcrest.cluster.errors import StepError
from goldcrest.cluster.training import train_local, train_on_ray
from goldcrest.cluster.training_config import TrainingConfig
from goldcrest.cluster.training_ray import _comes_again


@pytest.fixture(scope="module")
def toys() -> Iterator[ModuleType]:
    """The toy objectives, sent to workers by value: workers cannot import this folder."""
    from ray import cloudpickle

    path = Path(__file__).with_name("training_toys.py")
    spec = importlib.util.spec_from_file_location("training_toys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("preempted", [True, False])
def test_lost_nodes_and_lost_workers_have_budgets_of_their_own(
    ray_cluster: None,
    toys: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    preempted: bool,
) -> None:
    """Ray Train is told both, and the one that was used up is named."""
    from ray.train import PreemptionError
    from ray.train.v2.api.preemption import PreemptionInfo

    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    budgets: list[tuple[int, int]] = []

    class GivesUp:
        def __init__(self, _: object, *, run_config: Any, **__: object) -> None:
            told = run_config.failure_config
            budgets.append((told.max_failures, told.max_preemption_failures))

        def fit(self) -> None:
            raise PreemptionError(notice) if preempted else OSError("died")

    monkeypatch.setattr(training_ray, "_trainer_class", lambda: GivesUp)
    given = config(max_failures=2, max_preemptions=7)
    with pytest.raises(StepError) as error:
        train_on_ray(toys.Toy(), given, scratch=tmp_path, seed=5)
    assert budgets == [(2, 7)]
    lost = "its nodes to preemption more than 7" if preempted else "its workers more than 2"
    assert f"training lost {lost} times" in error.value.message
    assert str(error.value.hint).endswith("max_preemptions" if preempted else "max_failures")


class LoopFrames:
    """Runs a function below a frame of a file called training_loop.py."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "training_loop.py"
        self.path.write_text("def call(function):\n    function()\n", encoding="utf-8")

    def error_of(self, function: Callable[[], object]) -> BaseException:
        """What `function` raises when the loop calls it."""
        spec = importlib.util.spec_from_file_location("training_loop_double", self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(Exception) as caught:
            module.call(function)
        return caught.value


def test_which_errors_would_come_again(tmp_path: Path) -> None:
    loop = LoopFrames(tmp_path)
    assert _comes_again(StepError("the loss is not finite"))
    assert _comes_again(loop.error_of(lambda: [][1]))  # in the objective
    assert _comes_again(loop.error_of(lambda: torch.ones(2) @ torch.ones(3)))
    assert not _comes_again(loop.error_of(lambda: torch.distributed.barrier()))  # no group: dead
    assert not _comes_again(loop.error_of(lambda: Path("/nowhere/x").read_text("utf-8")))
    assert not _comes_again(AssertionError("DeepSpeed backend not set"))  # outside the objective

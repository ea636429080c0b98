"""Cores that a dead actor had reserved are free again; nobody else's are touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.reservations import release_orphans
from goldcrest.cluster.run import run
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import Chain, ChainConfig


def free_cores() -> float:
    """CPU cores that nobody has or holds."""
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.fixture
def reserve(ray_cluster: None) -> Iterator[Callable[..., Any]]:
    """Makes actors that have reserved cores, as the controller of a training does."""
    import ray

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self, cores: int, name: str) -> None:
            from ray.util.placement_group import placement_group

            lifetime = "detached" if name else None
            self.group = placement_group([{"CPU": cores}], name=name, lifetime=lifetime)

    made: list[Any] = []

    def one(cores: int, detached: str = "") -> Any:
        made.append(Controller.remote())
        ray.get(made[-1].reserve.remote(cores, detached))
        return made[-1]

    wait_until(lambda: free_cores() == 2)
    yield one
    for each in made:
        ray.kill(each)
    wait_until(lambda: release_orphans() == 0 and free_cores() == 2)


def test_cores_of_a_dead_actor_are_given_back(reserve: Callable[..., Any]) -> None:
    import ray

    controller = reserve(1)
    wait_until(lambda: free_cores() == 1)
    assert release_orphans() == 0  # it lives
    ray.kill(controller)
    time.sleep(1)
    assert free_cores() == 1  # Ray keeps them until the job ends
    wait_until(lambda: release_orphans() == 1)
    wait_until(lambda: free_cores() == 2)
    assert release_orphans() == 0


def test_a_reservation_that_still_waits_is_withdrawn_too(reserve: Callable[..., Any]) -> None:
    import ray

    ray.kill(reserve(5))  # more than there is: granted once a node joins
    wait_until(lambda: release_orphans() == 1)


def test_groups_of_the_driver_and_of_other_jobs_and_detached_ones_stay(
    reserve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.runtime_context import RuntimeContext
    from ray.util.placement_group import (
        get_placement_group,
        placement_group,
        remove_placement_group,
    )

    own = placement_group([{"CPU": 1}])
    ray.get(own.ready())
    ray.kill(reserve(5, "kept"))
    ray.kill(reserve(5))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(RuntimeContext, "get_job_id", lambda _: "ffff0000")
        time.sleep(1)  # Ray has noticed the two deaths
        assert release_orphans() == 0
    try:
        assert release_orphans() == 1
        assert free_cores() == 1
    finally:
        remove_placement_group(own)
        remove_placement_group(get_placement_group("kept"))


def test_a_run_frees_them_for_the_steps_that_wait(
    reserve: Callable[..., Any], tmp_path: Path
) -> None:
    """All cores are held by a training that is dead: without a look at them, nothing would run."""
    import ray

    controller = reserve(2)
    wait_until(lambda: free_cores() == 0)
    ray.kill(controller)
    result = run(Chain, ChainConfig(length=1), store=Store.open(tmp_path / "store"))
    assert result.status == "succeeded"

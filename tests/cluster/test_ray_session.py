"""Starting, joining and leaving Ray."""

from __future__ import annotations

import pytest

from goldcrest.cluster import ray_session
from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.ray_session import attach, leave


def test_a_running_ray_is_used_as_it_is_and_left_alone(ray_cluster: None) -> None:
    import ray

    mode = attach(Profile())
    assert mode == "attached"
    leave(mode)
    assert ray.is_initialized()


def test_a_ray_that_starts_too_slowly_gets_a_second_try_and_then_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    tried: list[str] = []

    def slow(**arguments: object) -> None:
        """What ray.init does on a machine that is too busy."""
        tried.append(str(arguments["address"]))
        raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(GoldcrestError, match=r"did not start in time.*calmer"):
        attach(Profile())
    assert tried == ["local", "local"]


@pytest.mark.parametrize("address", ["local", "10.0.0.1:6379"])
def test_inside_a_job_it_is_always_the_job_s_cluster(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """A second Ray inside a job's node, as the profile `laptop` asks for, is never meant."""
    seen: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(
        ray_session, "_start", lambda arguments, tries: seen.append(arguments["address"])
    )
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert attach(Profile.model_validate({"ray": {"address": address}})) == "joined"
    assert seen == ["auto"]

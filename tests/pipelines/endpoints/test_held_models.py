"""How many bundles a replica of the model holds, by Serve's own cache, without Serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve import multiplex

from goldcrest.pipelines.endpoints import speaker, speaker_models
from goldcrest.pipelines.endpoints.bundles import MOST_BUNDLES, MOST_HELD, BundleChoice
from goldcrest.pipelines.endpoints.speaker_models import SpeakerModels


class Toy:
    """A model that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def embed_waveform(self, _: np.ndarray) -> None:
        """A run."""
        self.runs += 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bundles that were read, in order; a folder's name is its content."""
    found: list[str] = []

    def load(model: str, device: str) -> Toy:
        assert device == "cpu"
        found.append(Path(model).name)
        return Toy()

    context = SimpleNamespace(app_name="a", deployment="d", replica_id="r")
    pusher = SimpleNamespace(register_or_update_task=lambda *_: None, start=lambda: None)
    monkeypatch.setattr(multiplex, "_get_internal_replica_context", lambda: context)
    monkeypatch.setattr(multiplex, "MetricsPusher", lambda: pusher)
    monkeypatch.setattr(speaker_models, "limit_threads", lambda _: None)
    monkeypatch.setattr(speaker_models, "model_id", lambda folder: f"f@{folder}")
    monkeypatch.setattr(speaker_models, "_load", load)
    return found


def config(*names: str) -> dict[str, Any]:
    """A user_config."""
    return {"bundles": {name: f"/{name}" for name in names}, "threshold": 0.5}


def replica() -> SpeakerModels:
    """A replica that holds nothing yet."""
    return SpeakerModels(max_seconds=1, min_seconds=0.1, max_batch=2, cpus=1)


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
def test_a_replica_with_a_gpu_computes_there(
    loads: list[str], monkeypatch: pytest.MonkeyPatch, gpus: float, device: str
) -> None:
    asked: list[str] = []

    def load(_: str, device: str) -> Toy:
        asked.append(device)
        return Toy()

    monkeypatch.setattr(speaker_models, "_load", load)
    models = SpeakerModels(max_seconds=1, min_seconds=0.1, max_batch=2, cpus=1, gpus=gpus)
    asyncio.run(models.reconfigure(config("a")))
    assert asked == [device]


def test_the_endpoint_tells_its_replicas_of_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Serve gives a replica and what the replica is told are one setting."""
    bound: list[dict[str, Any]] = []
    monkeypatch.setattr(
        speaker.serve,
        "deployment",
        lambda *_, **options: SimpleNamespace(bind=lambda **told: bound.append(options | told)),
    )
    monkeypatch.setattr(speaker, "ingress", lambda *_, **__: SimpleNamespace(bind=lambda *_: None))
    for gpus in (0.0, 0.5):
        speaker.application({"gpus": gpus})
    assert [each["gpus"] for each in bound] == [0.0, 0.5]
    assert [each["ray_actor_options"]["num_gpus"] for each in bound] == [0.0, 0.5]


def test_as_many_as_may_be_served_stay_in_memory_during_a_swap(loads: list[str]) -> None:
    """The old ones answer until the new ones are there."""
    old = [f"old{number}" for number in range(MOST_BUNDLES)]
    new = [f"new{number}" for number in range(MOST_BUNDLES)]

    async def test() -> None:
        models = replica()
        await models.reconfigure(config(*old))
        for name in (*new, *old):
            await models.load(f"f@/{name}")

    asyncio.run(test())
    assert loads == [*old, *new]


def test_models_that_were_swapped_out_do_not_pile_up(loads: list[str]) -> None:
    """With one bundle, a replica holds it and the one before; what it reads anew it runs anew."""

    async def test() -> None:
        models = replica()
        await models.reconfigure(config("first"))
        for name in ("second", "third", "second"):
            await models.load(f"f@/{name}")
        assert loads == ["first", "second", "third"]
        await models.load("f@/first")
        assert (await models._model("f@/first")).runs == 1

    asyncio.run(test())
    assert loads == ["first", "second", "third", "first"]


def test_more_bundles_than_before_are_all_held(loads: list[str]) -> None:
    """As when a Serve config file is deployed anew with other bundles."""

    async def test() -> None:
        models = replica()
        await models.reconfigure(config("a"))
        await models.reconfigure(config("b", "c", "d"))
        for name in "bcd":
            await models.load(f"f@/{name}")

    asyncio.run(test())
    assert loads == ["a", "b", "c", "d"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused(
    loads: list[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    async def embedded(frames: np.ndarray) -> np.ndarray:
        return frames[0]

    async def test() -> None:
        models = replica()
        monkeypatch.setattr(models, "_batched", embedded)
        for number, refused in ((1.0, ""), (value, "the model has no finite embedding for it")):
            decoded = np.zeros(16_000), np.array([[0.0, number]])
            monkeypatch.setattr(speaker_models, "_frames", lambda *_, made=decoded: made)
            found = await models._one(await models._model("f@/a"), b"a recording")
            assert (found.vector is None, found.refused) == (bool(refused), refused)

    asyncio.run(test())


def test_more_bundles_than_can_be_held_are_refused() -> None:
    assert MOST_HELD == 2 * MOST_BUNDLES
    names = [f"b{number}" for number in range(MOST_BUNDLES + 1)]
    with pytest.raises(ValueError, match="at most 16"):
        BundleChoice.read({"bundles": {name: f"/{name}" for name in names}})
    assert BundleChoice.read({"bundles": {name: f"/{name}" for name in names[1:]}})

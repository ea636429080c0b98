"""The HTTP side of the speaker endpoint by itself: which calls it makes of a model that only waits.

No server and no Ray: requests go to the application directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from goldcrest.pipelines.endpoints.speaker import SpeakerEndpoint, SpeakerSettings


class Call:
    """One call of the model: an answer that comes once `go` is set."""

    def __init__(self, go: asyncio.Event, answer: Any) -> None:
        self._go = go
        self._answer = answer
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._go.wait().__await__()
        return self._answer

    def cancel(self) -> None:
        """Of no effect where it is done, as Serve's."""
        self.cancelled = not self._go.is_set()


class Method:
    """A method of the model's handle."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer
        self.calls: list[Call] = []
        self.go = asyncio.Event()
        self.go.set()

    def remote(self, *values: Any) -> Call:
        """Call it."""
        self.calls.append(Call(self.go, self._answer(*values)))
        return self.calls[-1]


class Model:
    """The handle of a model that knows no voices."""

    def __init__(self) -> None:
        self.describe = Method(
            lambda folder: {
                "model": f"f-{Path(folder).name}@{folder}",
                "calibration": None,
                "dimensions": 2,
            }
        )
        self.load = Method(lambda _: None)
        self.embed = Method(lambda recordings: [None for _ in recordings])

    def options(self, **_: Any) -> Model:
        """The same for every bundle."""
        return self


@pytest.fixture
def model() -> Model:
    """A model that answers at once."""
    return Model()


@pytest.fixture
def endpoint(tmp_path: Path, model: Model) -> SpeakerEndpoint:
    """An endpoint in front of it, with nothing in service yet."""
    handle: Any = model
    return SpeakerEndpoint(SpeakerSettings(state_folder=tmp_path), handle)


def choice(name: str) -> dict[str, Any]:
    """A user_config of one bundle."""
    return {"bundles": {name: f"/bundles/{name}"}, "threshold": 0.5}


def test_a_choice_that_hung_does_not_replace_a_later_one(
    endpoint: SpeakerEndpoint, model: Model
) -> None:
    """As when a swap is taken back while one replica still loads the new models."""

    async def test() -> None:
        model.load.go.clear()
        late = asyncio.create_task(endpoint.reconfigure(choice("new")))
        while not model.load.calls:
            await asyncio.sleep(0)
        model.load.go, hung = asyncio.Event(), model.load.go
        model.load.go.set()
        await endpoint.reconfigure(choice("old"))
        hung.set()
        await late
        (served,) = (await endpoint.models())["models"]
        assert served["name"] == "old"

    asyncio.run(test())

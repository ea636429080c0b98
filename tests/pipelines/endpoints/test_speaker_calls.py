"""The HTTP side of the speaker endpoint by itself: which calls it makes of a model that only waits.

No server and no Ray: operations are called directly.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException, UploadFile
from ray.serve.exceptions import BackPressureError

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


def choice(name: str) -> dict[str, Any]:
    """A user_config of one bundle."""
    return {"bundles": {name: f"/bundles/{name}"}, "threshold": 0.5}


def in_service(folder: Path, model: Model, **settings: Any) -> SpeakerEndpoint:
    """An endpoint that serves one bundle, by a model that answers as `model` does."""
    handle: Any = model
    endpoint = SpeakerEndpoint(SpeakerSettings(state_folder=folder, **settings), handle)
    asyncio.run(endpoint.reconfigure(choice("one")))
    return endpoint


def test_a_choice_that_hung_does_not_replace_a_later_one(tmp_path: Path, model: Model) -> None:
    """As when a swap is taken back while one replica still loads the new models."""
    endpoint = in_service(tmp_path, model)
    model.load.calls.clear()

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


def recording() -> UploadFile:
    """A file as the form brings it."""
    return UploadFile(io.BytesIO(b"sound"))


def test_a_request_that_is_given_up_cancels_its_call(tmp_path: Path, model: Model) -> None:
    """Those that are let in next would otherwise find the model still at work for nobody."""
    endpoint = in_service(tmp_path, model)

    async def test() -> None:
        model.embed.go.clear()
        async with asyncio.timeout(0.05):  # as the gate's
            await endpoint.embed([recording()])

    with pytest.raises(TimeoutError):
        asyncio.run(test())
    assert [call.cancelled for call in model.embed.calls] == [True]


def test_a_busy_model_is_told_to_the_caller(tmp_path: Path, model: Model) -> None:
    def full(_: Any) -> Any:
        raise BackPressureError(num_queued_requests=64, max_queued_requests=64)

    model.embed = Method(full)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(in_service(tmp_path, model).embed([recording()]))
    assert refused.value.status_code == 503
    assert refused.value.headers == {"Retry-After": "1"}

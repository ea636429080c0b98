"""How the HTTP side of the generate endpoint calls the model side.

Making an answer changes nothing and the seed is part of the job, so a call whose replica was lost
before it said anything is made again. Whoever stops waiting cancels the call: Serve does not do so
by itself when the waiting task ends for another reason than the client's leaving.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from goldcrest.pipelines.endpoints.bundles import refuse
from goldcrest.pipelines.endpoints.generate_models import Begun, Completed, Delta, Job, Refused

_TRIES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A bundle in service: its name here, its content's fingerprint, its handle."""

    name: str
    fingerprint: str
    handle: DeploymentHandle
    facts: Mapping[str, Any]

    async def complete(self, job: Job) -> Completed:
        """The whole answer; HTTPException where there is none."""

        async def ask() -> Completed | Refused:
            call = self.handle.complete.remote(job)
            try:
                return await call
            finally:
                call.cancel()  # of no effect where it is done

        return _taken(await _tried(ask))

    async def transcribe(self, recording: bytes, max_tokens: int) -> Completed:
        """What is said in a recording; HTTPException where that can't be told."""

        async def ask() -> Completed | Refused:
            call = self.handle.transcribe.remote(recording, max_tokens)
            try:
                return await call
            finally:
                call.cancel()  # of no effect where it is done

        return _taken(await _tried(ask))

    async def stream(self, job: Job) -> Stream:
        """The answer while it is made, once the model has taken the job on; or HTTPException."""

        async def ask() -> tuple[Begun | Refused, Any]:
            call: Any = self.handle.options(stream=True).stream.remote(job)
            try:
                return await anext(call), call
            except BaseException:
                call.cancel()
                raise

        first, call = await _tried(ask)
        return Stream(_taken(first), call)


class Stream:
    """An answer that is being made."""

    def __init__(self, begun: Begun, call: Any) -> None:
        self.prompt_tokens = begun.prompt_tokens
        self._call = call

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._call

    def cancel(self) -> None:
        """Stop the model, if it is not done."""
        self._call.cancel()


async def _tried(ask: Callable[[], Awaitable[T]]) -> T:
    for left in reversed(range(_TRIES)):
        try:
            return await ask()
        except (BackPressureError, DeploymentUnavailableError):
            raise refuse(503, "busy", "the model is busy; try again", retry=1) from None
        except RayActorError:
            if not left:
                raise refuse(503, "busy", "the model was lost; try again", retry=5) from None
    raise AssertionError("the last try answers or raises")


def _taken(answer: T | Refused) -> T:
    """An answer of the model that is none of its refusals."""
    if isinstance(answer, Refused):
        raise refuse(400, answer.code, answer.message, param=answer.param)
    return answer

"""What the HTTP side of the generate endpoint asks of the model side.

Making an answer changes nothing, and the seed is part of the job: it may be asked for again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from goldcrest.pipelines.endpoints.bundles import refuse
from goldcrest.pipelines.endpoints.calls import answered, tried
from goldcrest.pipelines.endpoints.generate_models import Begun, Completed, Delta, Job, Refused

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
            done: Completed | Refused = await answered(self.handle.complete.remote(job))
            return done

        return _taken(await tried(ask))

    async def transcribe(self, recording: bytes, max_tokens: int) -> Completed:
        """What is said in a recording; HTTPException where that can't be told."""

        async def ask() -> Completed | Refused:
            call = self.handle.transcribe.remote(recording, max_tokens)
            done: Completed | Refused = await answered(call)
            return done

        return _taken(await tried(ask))

    async def stream(self, job: Job) -> Stream:
        """The answer while it is made, once the model has taken the job on; or HTTPException."""

        async def ask() -> tuple[Begun | Refused, Any]:
            call: Any = self.handle.options(stream=True).stream.remote(job)
            try:
                return await anext(call), call
            except BaseException:
                call.cancel()
                raise

        first, call = await tried(ask)
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


def _taken(answer: T | Refused) -> T:
    """An answer of the model that is none of its refusals."""
    if isinstance(answer, Refused):
        raise refuse(400, answer.code, answer.message, param=answer.param)
    return answer

"""How the HTTP side of an endpoint calls the model side.

What models are asked changes nothing, so a call whose replica was lost before it said anything is
made again. Whoever stops waiting cancels the call: Serve does not do so by itself when the waiting
task ends for another reason than the client's leaving, as when the gate's clock runs out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from goldcrest.pipelines.endpoints.bundles import refuse

_TRIES = 3

T = TypeVar("T")


async def answered(call: Any) -> Any:
    """The answer to a call of a handle, which is cancelled once nobody waits for it."""
    try:
        return await call
    finally:
        call.cancel()  # of no effect where it is done


async def tried(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` answers, asked again where a replica is lost; HTTPException 503 where the model is
    busy, or lost time and again."""
    for left in reversed(range(_TRIES)):
        try:
            return await ask()
        except (BackPressureError, DeploymentUnavailableError):
            raise refuse(503, "busy", "the model is busy; try again", retry=1) from None
        except RayActorError:
            if not left:
                raise refuse(503, "busy", "the model was lost; try again", retry=5) from None
    raise AssertionError("the last try answers or raises")

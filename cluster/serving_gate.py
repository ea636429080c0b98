"""The gate before every endpoint: who may call, how much, how long, and how many at once.

    request -> caller -> content encoding -> room? -> body counted while it streams -> the endpoint
               401/403   415                  503      413 (too large), 408 (too slow)   504

An ASGI middleware, so that it also sees WebSocket handshakes, and counts the body as it arrives:
a declared length proves nothing, and a chunked body declares none.

An answer that comes piece by piece (server-sent events) has two clocks: one until it begins, and a
longer one until it ends. Its reader has the status already when the second runs out, so the reason
comes as a last event.

Without a token only this machine may call, and only by a loopback name: a web page that the user
happens to have open could otherwise send forms to 127.0.0.1, under its own origin or, with a
rebound DNS name, under one that resolves to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from goldcrest.cluster.serving_events import is_event_stream, last_event

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HANG_UP = {"Connection": "close"}  # the rest of this body is not waited for
_DOCS = "/docs"  # a page, so it is opened in browsers
_BROWSERS = (
    ", which a browser can't send: curl -H 'Authorization: Bearer TOKEN' .../docs > docs.html"
)
_NO_ROUTE = "other"  # names that clients make up must not become time series


class Observer(Protocol):
    """What the gate tells of each request."""

    def began(self) -> None:
        """A request was let in."""
        ...

    def ended(self) -> None:
        """A request that was let in is done."""
        ...

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, by the endpoint or by the gate."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one replica of an endpoint takes on."""

    body_bytes: int = 16 << 20  # of one request's body
    body_seconds: float = 20.0  # until the whole body has arrived
    request_seconds: float = 30.0  # until the answer begins, the body included
    answer_seconds: float = 600.0  # from there to its end
    requests: int = 64  # at the same time; more are turned away at once
    retry_after: int = 1  # seconds, what those are told


@dataclass
class Gate:
    """The state of the gate: settings, the requests inside, and whether it is closing."""

    limits: Limits
    token_digest: bytes | None  # SHA-256 of the token; None: loopback callers only
    observer: Observer
    open_paths: Collection[str] = ("/healthz", "/readyz")  # answered without a token
    path_bytes: Mapping[str, int] = field(default_factory=dict)  # limits of bodies of their own
    inside: int = 0
    draining: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def body_bytes(self, path: str) -> int:
        """How large a body sent to `path` may be."""
        return self.path_bytes.get(path, self.limits.body_bytes)

    def enter(self) -> None:
        """Count a request in."""
        self.inside += 1
        self._idle.clear()
        self.observer.began()

    def leave(self) -> None:
        """Count a request out."""
        self.inside -= 1
        self.observer.ended()
        if not self.inside:
            self._idle.set()

    async def drain(self, seconds: float) -> int:
        """Let nobody in any more and wait for those inside; how many are left after `seconds`."""
        self.draining = True
        if self.inside:
            try:
                await asyncio.wait_for(self._idle.wait(), seconds)
            except TimeoutError:
                return self.inside
        return 0


def token_digest(token: str) -> bytes:
    """What is kept of a token: enough to recognise it, useless to whoever reads it."""
    return hashlib.sha256(token.encode()).digest()


def problem(status: int, code: str, message: str, scope: Scope, **more: Any) -> JSONResponse:
    """An error as the answer to a request."""
    headers = more.pop("headers", None)
    body = problem_body(status, code, message, scope, **more)
    return JSONResponse(body, status_code=status, headers=headers)


def problem_body(
    status: int, code: str, message: str, scope: Scope, *, param: str | None = None, **more: Any
) -> dict[str, Any]:
    """The one shape of every error: `{"error": {"code", "message", ...}, "request_id"}`.

    `type` and `param` (the field that is wrong) are there for clients of OpenAI's interface, which
    read them.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"code": code, "message": message, "type": kind, "param": param, **more}
    return {"error": error, "request_id": request_id(scope)}


def request_id(scope: Scope) -> str | None:
    """The id under which this request is logged; None where the caller's own is not a plain one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _PLAIN_ID.fullmatch(given) else None


class GateMiddleware:
    """Puts a `Gate` before an ASGI application."""

    def __init__(self, app: App, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection: HTTP, WebSocket, or the lifespan of the application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None and scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})  # before accept: HTTP 403
            elif refusal is not None:
                await refusal(scope, receive, note)
            elif scope["type"] == "websocket" or scope["path"] in self._gate.open_paths:
                await self._app(scope, receive, note)
            else:
                await self._admitted(scope, receive, note)
        finally:
            if scope["type"] == "http":
                seconds = time.perf_counter() - began
                self._gate.observer.answered(_route_of(scope), status, seconds)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that is turned away unread, or None."""
        headers = Headers(scope=scope)
        gate = self._gate
        if scope["path"] not in gate.open_paths:
            if gate.token_digest is None:
                reason = _not_from_here(scope, headers)
                if reason:
                    return problem(403, "forbidden", reason, scope)
            elif not _has_token(headers, gate.token_digest):
                said = "this endpoint wants the header `Authorization: Bearer TOKEN`"
                if scope["path"] == _DOCS:
                    said += _BROWSERS
                return problem(
                    401,
                    "unauthorized",
                    said,
                    scope,
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if gate.draining or gate.inside >= gate.limits.requests:
                why = "stopping" if gate.draining else "busy"
                return problem(
                    503,
                    why,
                    f"the endpoint is {why}; try again",
                    scope,
                    headers={"Retry-After": str(gate.limits.retry_after)},
                )
        if headers.get("content-encoding", "identity").lower() != "identity":
            return problem(415, "encoded_body", "compressed bodies are not unpacked here", scope)
        declared = headers.get("content-length", "")
        limit = gate.body_bytes(scope["path"])
        if declared.isdecimal() and int(declared[:18]) > limit:
            return problem(413, "too_large", f"the body is larger than {limit} bytes", scope)
        return None

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the endpoint with a counted body and two clocks."""
        gate = self._gate
        body = _Body(receive, gate.body_bytes(scope["path"]), gate.limits.body_seconds)
        begun: Message | None = None

        async def noting(message: Message) -> None:
            nonlocal begun
            if begun is None:
                begun = message
                clock.reschedule(asyncio.get_running_loop().time() + gate.limits.answer_seconds)
            await send(message)

        gate.enter()
        try:
            async with asyncio.timeout(gate.limits.request_seconds) as clock:
                await self._app(scope, body.receive, noting)
        except HTTPException as error:  # of the body, on its way through a handler that reads it
            if begun is not None:
                raise
            await answer_of(error, scope)(scope, receive, send)
        except TimeoutError:
            if begun is None:
                said = f"no answer within {gate.limits.request_seconds:g} s"
                await problem(504, "timeout", said, scope)(scope, receive, send)
            elif clock.expired() and is_event_stream(begun):
                said = f"the answer took longer than {gate.limits.answer_seconds:g} s"
                await send(last_event(problem_body(504, "timeout", said, scope)))
            else:
                raise
        finally:
            gate.leave()


def answer_of(error: HTTPException, scope: Scope) -> JSONResponse:
    """An HTTPException as a `problem`; its detail is a sentence or `(code, sentence)`."""
    detail: Any = error.detail
    if isinstance(detail, dict):
        more = {name: value for name, value in detail.items() if name not in ("code", "message")}
        code, message = str(detail["code"]), str(detail["message"])
    else:
        more, code, message = {}, _CODES.get(error.status_code, "error"), str(detail)
    headers = dict(error.headers or {})
    return problem(error.status_code, code, message, scope, headers=headers, **more)


_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    422: "invalid",
}


class _Body:
    """`receive` of one request, counted and timed; raises HTTPException, which frameworks pass."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive = receive
        self._most = most  # bytes
        self._bytes = 0
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._complete = False

    async def receive(self) -> Message:
        """The next message from the client."""
        if self._complete:
            return await self._receive()  # waits for a disconnect: that takes as long as it takes
        left = max(0.0, self._ends - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            said = f"the body did not arrive within {self._seconds:g} s"
            raise HTTPException(408, said, _HANG_UP) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            raise HTTPException(413, f"the body is larger than {self._most} bytes", _HANG_UP)
        self._complete = not message.get("more_body", False)
        return message


def _has_token(headers: Headers, digest: bytes) -> bool:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(token_digest(token.strip()), digest)
    return same and scheme.lower() == "bearer"


def _not_from_here(scope: Scope, headers: Headers) -> str:
    """Why a request without a token is not one of this machine's user; empty if it is."""
    client = scope.get("client")
    if client is not None and not is_loopback(str(client[0])):
        return "this endpoint has no token: only its own machine may call it"
    if not is_loopback(_host_name(f"//{headers.get('host', '')}")):
        return "this endpoint has no token: call it as 127.0.0.1 or localhost"
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_host_name(origin)):
        return "this endpoint has no token: pages of other sites may not call it"
    return ""


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _route_of(scope: Scope) -> str:
    """The pattern of the route that answered, as `/speakers/{speaker}`."""
    return str(getattr(scope.get("route"), "path", _NO_ROUTE))

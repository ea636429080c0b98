"""The base of every endpoint: a Ray Serve ingress with a gate, health, metrics and typed errors.

    class SpeakerEndpoint(Endpoint):                  # pipelines/endpoints/speaker.py
        def routes(self) -> APIRouter: ...            # what it can do
        async def ready(self) -> None: ...            # raises while it cannot

    app = ingress(SpeakerEndpoint, settings).bind(settings, models)

`Endpoint` is deployed as the ingress: thin, asynchronous, without the model. Models are deployments
of their own behind it, so that a crash in native code (a decoder, a kernel) takes no connection
with it, and that replicas with and without a GPU can be counted apart.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from ray import serve
from starlette.exceptions import HTTPException

from goldcrest.cluster.api import Config
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.serving_gate import (
    Gate,
    GateMiddleware,
    Limits,
    answer_of,
    problem,
    token_digest,
)
from goldcrest.cluster.serving_metrics import CONTENT_TYPE, FOLDER_VARIABLE, RequestMetrics

TOKEN_LENGTH = (
    20  # characters at least: the gate keeps a plain hash, so a token must not be guessed
)
_DOCS = jinja2.Environment(autoescape=True).from_string(
    Path(__file__).with_name("serving_docs.html").read_text("utf-8")
)
SCRATCH = "serve-scratch"  # in the state folder: of one server's life, a new one removes it
_READY_SECONDS = 1.0  # an answer of `/readyz` is this old at most
_QUEUE_FACTOR = 4  # the gate, not the proxy's queue, should be what turns requests away


class ServingSettings(Config):
    """What every endpoint is told; part of a Serve config file's `args`."""

    token_file: Path | None = Field(
        None, description="file with the bearer token; without one only this machine may call"
    )
    state_folder: Path = Field(
        Path(".goldcrest/serve"), description="where the endpoint keeps what survives a restart"
    )
    metrics_folder: Path | None = Field(
        None,
        description="where HTTP replicas count, empty at the start and on a local disk; null: a "
        "folder of each start's own in the node's temporary one",
    )
    replicas: int = Field(1, ge=1, le=1024, description="replicas of the model")
    max_replicas: int | None = Field(
        None, ge=1, le=1024, description="scale the model's replicas up to this many under load"
    )
    api_replicas: int = Field(
        1, ge=1, le=64, description="replicas of the HTTP side; all on the state folder's node"
    )
    cpus: float = Field(1.0, ge=0, description="CPU cores of each replica of the model")
    gpus: float = Field(0.0, ge=0, description="GPUs of each replica of the model")
    api_resources: dict[str, float] = Field(
        {}, description="Ray resources that pin the HTTP side to the node of the state folder"
    )
    max_body_bytes: int = Field(16 << 20, ge=1024, description="largest body of a request, bytes")
    body_seconds: float = Field(20.0, gt=0, description="time for a request's body to arrive")
    request_seconds: float = Field(30.0, gt=0, description="time until the answer begins")
    answer_seconds: float = Field(
        600.0, gt=0, description="time from there to the end of an answer that is streamed"
    )
    max_requests: int = Field(
        64, ge=1, description="requests inside one HTTP replica; more are answered 503 at once"
    )
    drain_seconds: float = Field(15.0, ge=0, description="time for requests inside when stopping")

    @property
    def scratch_folder(self) -> Path:
        """What is worth nothing after this server: under one name that no user's folder has."""
        return self.state_folder.absolute() / SCRATCH

    @property
    def limits(self) -> Limits:
        """The gate's part of the settings."""
        return Limits(
            body_bytes=self.max_body_bytes,
            body_seconds=self.body_seconds,
            request_seconds=self.request_seconds,
            answer_seconds=self.answer_seconds,
            requests=self.max_requests,
        )


class Endpoint(ABC):
    """The HTTP side of a served model: routes of its own behind the gate, and the common ones."""

    title = "Goldcrest"
    invalid_status = 422  # of requests whose fields are wrong
    open_paths: Sequence[str] = ()  # static pages that ask for the token themselves

    def __init__(self, settings: ServingSettings) -> None:
        digest = None
        if settings.token_file is not None:
            digest = token_digest(read_token(settings.token_file))
        self.metrics = RequestMetrics()
        self.gate = Gate(
            limits=settings.limits,
            token_digest=digest,
            observer=self.metrics,
            open_paths=frozenset({"/healthz", "/readyz", *self.open_paths}),
        )

    @abstractmethod
    def routes(self) -> APIRouter:
        """The endpoint's own operations."""

    @abstractmethod
    async def ready(self) -> None:
        """For `/readyz`: an exception says why requests cannot be answered now.

        Anybody may ask there, without the token: it is called once a second at most.
        """

    async def drain(self, seconds: float) -> int:
        """Turn new requests away and wait for those inside; the number left after `seconds`."""
        return await self.gate.drain(seconds)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls, in the replica, for the application."""
        app = FastAPI(
            title=self.title, docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None
        )
        app.add_middleware(GateMiddleware, gate=self.gate)
        app.add_exception_handler(HTTPException, _http_problem)
        app.add_exception_handler(RequestValidationError, self._validation_problem)
        app.add_exception_handler(Exception, _unexpected_problem)
        app.include_router(self._common_routes())
        app.include_router(self.routes())
        return app

    def _common_routes(self) -> APIRouter:
        router = APIRouter(tags=["operations"])
        readiness = _Readiness(self.ready)

        @router.get("/healthz", summary="Is the process alive?")
        async def healthz() -> dict[str, str]:
            return {"status": "alive"}

        @router.get("/readyz", summary="Can requests be answered now?")
        async def readyz(request: Request) -> JSONResponse:
            if self.gate.draining:
                return problem(503, "stopping", "the endpoint is stopping", request.scope)
            fault = await readiness.fault()
            if fault:
                return problem(503, "not_ready", f"not ready: {fault}", request.scope)
            return JSONResponse({"status": "ready"})

        @router.get("/docs", include_in_schema=False)
        async def docs(request: Request) -> Response:
            return page(_DOCS.render(api=request.app.openapi()))

        @router.get("/metrics", summary="Metrics in Prometheus' text format")
        async def metrics() -> Response:
            return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)

        return router

    async def _validation_problem(self, request: Request, error: Any) -> JSONResponse:
        """Every wrong field with its reason, never its value: that may be a secret, or huge."""
        fields = [_field_problem(each) for each in error.errors()[:20]]
        named = (f"{each['field']}: " if each["field"] else "" for each in fields)
        said = "; ".join(name + each["message"] for name, each in zip(named, fields, strict=True))
        first = fields[0]["field"] or None
        return problem(
            self.invalid_status, "invalid", said[:1000], request.scope, param=first, fields=fields
        )


def _field_problem(error: Mapping[str, Any]) -> dict[str, str]:
    """One of pydantic's errors; of a body that is no JSON the place is a byte, not a field."""
    place = ".".join(str(part) for part in error["loc"][1:])
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", error["msg"])
        return {"field": "", "message": f"the body is not JSON: {reason} at byte {place}"}
    return {"field": place[:200], "message": error["msg"]}


class _Readiness:
    """Whether an endpoint is ready, asked one call at a time and remembered for a moment.

    `/readyz` stands outside the gate: without this, whoever calls it often would fill the model.
    """

    def __init__(self, ask: Callable[[], Awaitable[None]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[str] | None = None
        self._stale = 0.0  # when the last answer is too old

    async def fault(self) -> str:
        """The kind of error that keeps the endpoint from being ready; empty if it is ready."""
        if self._asking is None or (self._asking.done() and time.monotonic() >= self._stale):
            self._asking = asyncio.create_task(self._answer())
        return await asyncio.shield(self._asking)  # a caller who leaves stops it for nobody

    async def _answer(self) -> str:
        try:
            await self._ask()
        except Exception as error:  # noqa: BLE001 - whatever it is, the endpoint is not ready
            return type(error).__name__
        else:
            return ""
        finally:
            self._stale = time.monotonic() + _READY_SECONDS


def page(content: str, *, scripts: bool = False) -> Response:
    """An HTML page that loads nothing from elsewhere and may be framed by nobody."""
    own = "'self'" if scripts else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {own}; connect-src {own}; "
        "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def ingress(endpoint: type[Endpoint], settings: ServingSettings, **options: Any) -> Any:
    """The deployment of an endpoint; `.bind(settings, ...)` makes the application."""
    # Of this start alone, and not in the state folder, which may outlive the node: elsewhere the
    # files of dead replicas would pile up, and a replica with the id of one take over its values.
    metrics = settings.metrics_folder or Path(
        tempfile.gettempdir(), f"goldcrest-metrics-{secrets.token_hex(8)}"
    )
    crowd = _QUEUE_FACTOR * settings.max_requests
    return serve.deployment(
        serve.ingress()(endpoint),
        name=endpoint.__name__,
        num_replicas=settings.api_replicas,
        max_ongoing_requests=crowd,
        max_queued_requests=crowd,
        backpressure_config={"status_code": 503, "retry_after_s": settings.limits.retry_after},
        ray_actor_options={
            "num_cpus": 0,  # it waits; the models compute
            "resources": settings.api_resources,
            "runtime_env": {"env_vars": {FOLDER_VARIABLE: str(metrics.absolute())}},
        },
        graceful_shutdown_timeout_s=settings.drain_seconds + 1.0,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=10,
        **options,
    )


def model_options(settings: ServingSettings) -> dict[str, Any]:
    """Options of `serve.deployment` for the model behind an endpoint: how many, and where."""
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        if settings.max_replicas < settings.replicas:
            raise InputError(
                f"max_replicas ({settings.max_replicas}) is below replicas ({settings.replicas})"
            )
        scale = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": 4,
                "upscale_delay_s": 2,
                "downscale_delay_s": 30,
            },
        }
    return {
        **scale,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        "max_ongoing_requests": settings.max_requests,
        # Of each HTTP replica, on top of those that are being answered; its gate lets no more in.
        "max_queued_requests": settings.max_requests,
        "graceful_shutdown_timeout_s": settings.drain_seconds + 1.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
    }


def read_token(path: Path) -> str:
    """The token in a file (its first line); InputError where it is unusable."""
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise InputError(f"the token file {path} is not a file")
            token = stream.read(4096).decode("ascii").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not plain ASCII text"
        raise InputError(f"the token file {path} cannot be read: {reason}") from None
    if len(token) < TOKEN_LENGTH or not token.isprintable() or " " in token:
        raise InputError(
            f"the token in {path} is not usable: {TOKEN_LENGTH} characters at least, no spaces",
            hint="make one with `openssl rand -hex 32`",
        )
    return token


# ------------------------------------------------------------------------------------- errors


async def _http_problem(request: Request, error: Any) -> JSONResponse:
    return answer_of(error, request.scope)


async def _unexpected_problem(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours: its text stays in the log, where Starlette puts it."""
    return problem(500, "internal", "an unexpected fault; the log has it", request.scope)

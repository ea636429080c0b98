"""The generate endpoint: OpenAI's interface on language bundles.

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"prompt": "The goldcrest is", "max_tokens": 20, "temperature": 0}'

    curl -F file=@zero.wav http://127.0.0.1:8000/v1/audio/transcriptions       # a speech bundle

`/v1/completions`, `/v1/chat/completions` and `/v1/models` as OpenAI's clients call them, errors
included; with `stream: true` text comes as server-sent events while it is made. A speech bundle
answers `/v1/audio/transcriptions` instead. Several bundles are told apart by the request's field
`model`.

The HTTP side checks requests and shapes answers, the model side (`generate_models.py`) has tokens
and weights. A reader that goes away, or a clock that runs out, cancels the call there, and the
model stops before its next token.

The bundles that are served are this deployment's `user_config`: changing it swaps models while
requests go on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi import Path as PathParameter
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from goldcrest.cluster.serving import Endpoint, ingress, model_options
from goldcrest.cluster.serving_events import DONE, EventStream, event
from goldcrest.cluster.serving_gate import Scope, problem_body
from goldcrest.pipelines.endpoints.bundles import (
    DEMO_PATHS,
    BundleChoice,
    BundleSettings,
    ServedKind,
    demo_routes,
    fingerprint,
    refuse,
)
from goldcrest.pipelines.endpoints.calls import answered
from goldcrest.pipelines.endpoints.generate_answers import (
    ChatCompletion,
    Completion,
    Head,
    ModelCard,
    ModelList,
    Transcription,
    usage,
)
from goldcrest.pipelines.endpoints.generate_calls import Served
from goldcrest.pipelines.endpoints.generate_metrics import GenerateMetrics
from goldcrest.pipelines.endpoints.generate_models import (
    Job,
    TextModels,
    check_choice,
    members,
    model_id,
)
from goldcrest.pipelines.endpoints.generate_prompts import Prompt
from goldcrest.pipelines.endpoints.generate_requests import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
)
from goldcrest.tasks.language.generation import GenerationSettings

_COMPLETION_TOKENS = 16  # the interface's default
_DEMO = Path(__file__).with_name("generate_demo.html")
_log = logging.getLogger("ray.serve")


class GenerateSettings(BundleSettings):
    """`args` of the generate application in a Serve config file."""

    max_body_bytes: int = Field(1 << 20, ge=1024, description="largest body of a request, bytes")
    max_audio_bytes: int = Field(
        16 << 20,
        ge=1024,
        description="largest body of a transcription, bytes, where a speech bundle is served",
    )
    request_seconds: float = Field(
        120.0,
        gt=0,
        description="time until the answer begins; one that is not streamed is made "
        "as a whole before",
    )
    max_context: int = Field(
        8192,
        ge=2,
        description="tokens of a prompt and its answer together, where the model allows more",
    )
    max_tokens: int = Field(1024, ge=1, description="longest answer, tokens")
    max_choices: int = Field(
        16, ge=1, le=1024, description="answers of one request: prompts times n"
    )
    parallel: int = Field(
        4, ge=1, le=256, description="generations that a replica runs side by side; others wait"
    )
    max_batch: int = Field(
        16, ge=1, le=1024, description="greedy prompts that run through the model as one batch"
    )


_TRANSCRIPTIONS = "/v1/audio/transcriptions"
_HEARD = {"file", "model", "response_format", "temperature"}
"""Fields of a transcription's form; others would be ignored, which is worse than refused."""


class GenerateEndpoint(Endpoint):
    """The HTTP side; a deployment by `application`."""

    title = "Goldcrest generate endpoint"
    invalid_status = 400  # as OpenAI answers, whose clients make their own error of it

    def __init__(self, settings: GenerateSettings, models: DeploymentHandle) -> None:
        if settings.demo:
            self.open_paths = DEMO_PATHS  # the page asks for the token itself
        super().__init__(settings)
        self._settings = settings
        self._models = models
        self._served: dict[str, Served] = {}
        self._user_config: dict[str, Any] = {}
        self._choices = 0  # how often another one was asked for
        self._text = GenerateMetrics(self.metrics.registry)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the bundles of a choice into service; requests go on meanwhile.

        A choice that is overtaken by a later one while it loads comes to nothing.
        """
        self._choices += 1
        turn = self._choices
        served = {}
        for name, folder in BundleChoice.read(user_config).bundles.items():
            facts = await self._models.describe.remote(str(folder))
            handle = self._models.options(multiplexed_model_id=facts["model"])
            await handle.load.remote(facts["model"])
            served[name] = Served(name, fingerprint(facts["model"]), handle, facts)
        if turn == self._choices:
            self._served, self._user_config = served, user_config
            hears = any(each.facts["family"] == "speech" for each in served.values())
            most = self._settings.max_audio_bytes
            self.gate.path_bytes = {_TRANSCRIPTIONS: most} if hears else {}

    async def reload(self) -> None:
        """Look at the bundles again; on any error those in service stay."""
        await self.reconfigure(self._user_config)

    async def ready(self) -> None:
        """A replica answers for the default model."""
        default = self._model(None)
        async with asyncio.timeout(5.0):
            await answered(default.handle.load.remote(default.facts["model"]))

    def routes(self) -> APIRouter:
        """The operations, bound to this replica."""
        router = APIRouter(
            tags=["generate"],
            form_limits={"max_files": 1, "max_fields": 10, "max_part_size": 4096},
        )
        router.add_api_route(
            "/v1/completions",
            self.completions,
            methods=["POST"],
            response_model=Completion,
            summary="Go on with a text",
        )
        router.add_api_route(
            "/v1/chat/completions",
            self.chat,
            methods=["POST"],
            response_model=ChatCompletion,
            summary="Answer in a conversation",
        )
        router.add_api_route(
            _TRANSCRIPTIONS,
            self.transcriptions,
            methods=["POST"],
            response_model=Transcription,
            summary="Write down what is said",
        )
        router.add_api_route("/v1/models", self.models, methods=["GET"], summary="What is served")
        router.add_api_route(
            "/v1/models/{model}", self.model, methods=["GET"], summary="One of these models"
        )
        if self._settings.demo:
            router.include_router(demo_routes(_DEMO))
        return router

    # ------------------------------------------------------------------------------ operations

    async def completions(self, body: CompletionRequest, request: Request) -> Any:
        """Text that follows a prompt, or several prompts."""
        limit = body.max_tokens or min(_COMPLETION_TOKENS, self._settings.max_tokens)
        return await self._answer(body, tuple(body.prompt), limit, request.scope)

    async def chat(self, body: ChatRequest, request: Request) -> Any:
        """The assistant's next turn; without `max_tokens` as long as there is room."""
        return await self._answer(body, (body.turns,), body.limit, request.scope)

    async def transcriptions(
        self,
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, OGG, MP3...")],
        model: Annotated[str | None, Form(max_length=64)] = None,
        response_format: Annotated[Literal["json", "text"], Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=0, description="greedy alone is built")] = 0,
    ) -> Any:
        """What is said in a recording that fits the model's window, greedily."""
        unknown = sorted(set(await request.form()) - _HEARD)
        if unknown:
            raise refuse(400, "unknown_field", f"'{unknown[0]}' is not built", param=unknown[0])
        served = self._model(model)
        done = await served.transcribe(await file.read(), self._settings.max_tokens)
        (answer,) = done.answers
        self._text.used(served.name, prompt=done.prompt_tokens, completion=len(answer.tokens))
        if response_format == "text":
            return PlainTextResponse(f"{answer.text}\n")
        return Transcription(text=answer.text, model=served.name)

    async def models(self) -> ModelList:
        """The bundles in service."""
        return ModelList(data=[_card(each) for each in self._served.values()])

    async def model(self, model: Annotated[str, PathParameter(max_length=64)]) -> ModelCard:
        """One bundle in service."""
        return _card(self._model(model))

    # ----------------------------------------------------------------------------------- parts

    def _model(self, name: str | None) -> Served:
        """The bundle that a request asks for."""
        served = self._served
        if name is None:
            return next(iter(served.values()))
        if name not in served:
            known = f"there is no such model; those here are: {', '.join(served)}"
            raise refuse(404, "model_not_found", known, param="model")
        return served[name]

    async def _answer(
        self,
        body: GenerateRequest,
        prompts: tuple[Prompt, ...],
        max_tokens: int | None,
        scope: Scope,
    ) -> Response | Completion | ChatCompletion:
        served = self._model(body.model)
        job = Job(
            prompts=prompts,
            settings=self._choosing(body),
            max_tokens=self._allowed(max_tokens, body),
            choices=body.choices,
        )
        asked = len(prompts) * body.choices
        if asked > self._settings.max_choices:
            said = (
                f"{asked} answers are asked for; this endpoint makes {self._settings.max_choices}"
            )
            raise refuse(400, "too_many_choices", f"{said} in one request", param="n")
        head = Head(
            chat=isinstance(body, ChatRequest),
            model=served.name,
            fingerprint=served.fingerprint,
            with_usage=body.with_usage,
        )
        if body.stream:
            return await self._streamed(served, job, head, scope)
        done = await served.complete(job)
        written = sum(len(each.tokens) for each in done.answers)
        self._text.used(served.name, prompt=done.prompt_tokens, completion=written)
        return head.whole(done.answers, usage(done.prompt_tokens, written))

    def _choosing(self, body: GenerateRequest) -> GenerationSettings:
        """How tokens are chosen; without a seed, by one that nobody else gets."""
        most = self._settings.max_tokens
        if body.greedy:
            return GenerationSettings(max_new_tokens=most, stop=tuple(body.stop))
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
        return GenerationSettings(
            max_new_tokens=most,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
            stop=tuple(body.stop),
        )

    def _allowed(self, max_tokens: int | None, body: GenerateRequest) -> int | None:
        most = self._settings.max_tokens
        if max_tokens is not None and max_tokens > most:
            said = f"answers here have {most} tokens at most"
            raise refuse(400, "too_many_tokens", said, param=body.limited_by)
        return max_tokens

    async def _streamed(self, served: Served, job: Job, head: Head, scope: Scope) -> EventStream:
        """The answer as events; what is wrong with the request still gets a status."""
        clock = self._text.stream(served.name)
        stream = await served.stream(job)

        async def events() -> AsyncIterator[bytes]:
            written = 0
            try:
                for each in head.first(len(job.prompts) * job.choices):
                    yield event(each)
                async for delta in stream:
                    clock.heard(delta.tokens)
                    written += delta.tokens
                    for each in head.more(delta):
                        yield event(each)
                for each in head.last(usage(stream.prompt_tokens, written)):
                    yield event(each)
                yield DONE
            except Exception:  # noqa: BLE001 - the status is sent: only an event can tell
                _log.exception("a stream broke off")
                yield event(problem_body(500, "internal", "the answer broke off", scope))
            finally:
                stream.cancel()
                clock.ended()
                self._text.used(served.name, prompt=stream.prompt_tokens, completion=written)

        return EventStream(events())


def _card(served: Served) -> ModelCard:
    facts = served.facts
    return ModelCard(
        id=served.name,
        created=facts["created"],
        architecture=facts["architecture"],
        family=facts["family"],
        parameters=facts["parameters"],
        fingerprint=served.fingerprint,
    )


# ---------------------------------------------------------------------------------- deployment


def application(args: GenerateSettings | Mapping[str, Any]) -> serve.Application:
    """The Serve application: `import_path: goldcrest.pipelines.endpoints.generate:application`.

    `args` are the settings, or their mapping in a Serve config: Serve makes settings of it only
    for annotations that are classes, not for postponed ones.
    """
    settings = GenerateSettings.model_validate(args)
    models: Any = serve.deployment(
        TextModels, name="TextModels", user_config=settings.models, **model_options(settings)
    )
    endpoint = ingress(GenerateEndpoint, settings, user_config=settings.models)
    return endpoint.bind(
        settings,
        models.bind(
            max_context=settings.max_context,
            parallel=settings.parallel,
            max_batch=settings.max_batch,
            cpus=settings.cpus,
            gpus=settings.gpus,
        ),
    )


SERVED = ServedKind(
    endpoint=GenerateEndpoint.__name__,
    models=TextModels.__name__,
    settings=GenerateSettings,
    choice=BundleChoice,
    application=application,
    members=members,
    identity=model_id,
    check=check_choice,
)

"""The speaker endpoint: enrol, verify, identify, embed.

    curl -F speaker=anna -F audio=@anna1.wav -F audio=@anna2.wav http://127.0.0.1:8000/enroll
    curl -F speaker=anna -F audio=@who.wav http://127.0.0.1:8000/verify
    {"score": 0.61, "accept": true, "threshold": 0.35, "model": "int8"}

A score is the cosine of two embeddings, as in the evaluation; several recordings of one side are
averaged as unit vectors first. The threshold is the calibration's, at the equal error rate or at a
chosen false-accept rate.

The bundles that are served are this deployment's `user_config`: changing it swaps models while
requests go on. The new ones are loaded before the old ones are let go, and a request keeps the
model that it began with.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, File, Form, HTTPException, UploadFile
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from goldcrest.cluster.serving import Endpoint, ingress, model_options
from goldcrest.pipelines.endpoints.bundles import (
    DEMO_PATHS,
    ID,
    BundleSettings,
    ServedKind,
    demo_routes,
    fingerprint,
    refuse,
)
from goldcrest.pipelines.endpoints.calls import answered, tried
from goldcrest.pipelines.endpoints.speaker_calibration import Calibration
from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice, check_choice
from goldcrest.pipelines.endpoints.speaker_enrolments import (
    Enrolments,
    FullError,
    Recording,
    pooled,
    unit,
)
from goldcrest.pipelines.endpoints.speaker_forms import only_known_fields
from goldcrest.pipelines.endpoints.speaker_models import (
    Embedded,
    SpeakerModels,
    members,
    model_id,
)

DATABASE = "speakers.sqlite"
_DEMO = Path(__file__).with_name("speaker_demo.html")


class SpeakerSettings(BundleSettings):
    """`args` of the speaker application in a Serve config file."""

    min_seconds: float = Field(0.3, gt=0, description="shortest recording, seconds")
    max_seconds: float = Field(60.0, gt=0, description="longest recording, seconds")
    max_recordings: int = Field(10, ge=2, le=100, description="recordings of one request")
    max_enrolled: int = Field(50, ge=1, description="recordings that are kept of one speaker")
    max_speakers: int = Field(100_000, ge=1, description="speakers that can be enrolled")
    max_batch: int = Field(16, ge=1, le=1024, description="recordings embedded in one pass")


# ------------------------------------------------------------------------------------ answers


class Enrolled(BaseModel):
    """Answer of `/enroll`."""

    speaker: str
    model: str
    recordings: int = Field(description="how many are now kept of this speaker")
    seconds: float = Field(description="duration of what this request brought")


class Verified(BaseModel):
    """Answer of `/verify`."""

    score: float = Field(description="cosine in [-1, 1]")
    accept: bool = Field(description="whether score >= threshold")
    threshold: float
    model: str


class Candidate(BaseModel):
    """One speaker in the answer of `/identify`."""

    speaker: str
    score: float
    accept: bool


class Identified(BaseModel):
    """Answer of `/identify`, best first."""

    candidates: list[Candidate]
    threshold: float
    model: str


class Embeddings(BaseModel):
    """Answer of `/embed`: unit-length vectors."""

    embedding: list[float] = Field(description="of all recordings together")
    embeddings: list[list[float]] = Field(description="of each recording")
    seconds: list[float]
    model: str


# ----------------------------------------------------------------------------------- endpoint


@dataclass(frozen=True)
class Served:
    """A bundle in service: its name here, its content's fingerprint, its handle and threshold."""

    name: str
    fingerprint: str
    handle: DeploymentHandle
    threshold: float
    facts: Mapping[str, Any]


Audio = Annotated[
    list[UploadFile], File(description="WAV, FLAC, OGG, MP3...; once or several times")
]
SpeakerId = Annotated[str, Form(pattern=ID, description="letters, digits and ._@-, 64 at most")]
ModelName = Annotated[
    str | None, Form(max_length=64, description="which bundle [default: the first]")
]


class SpeakerEndpoint(Endpoint):
    """The HTTP side; a deployment by `application`."""

    title = "Goldcrest speaker endpoint"

    def __init__(self, settings: SpeakerSettings, models: DeploymentHandle) -> None:
        if settings.demo:
            self.open_paths = DEMO_PATHS  # the page asks for the token itself
        super().__init__(settings)
        self._settings = settings
        self._models = models
        self._served: dict[str, Served] = {}
        self._user_config: dict[str, Any] = {}
        self._choices = 0  # how often another one was asked for
        self._enrolments = Enrolments(
            settings.state_folder.absolute() / DATABASE,
            max_speakers=settings.max_speakers,
            max_recordings=settings.max_enrolled,
        )
        # One at a time: those that wait must not hold the threads that other operations need.
        self._whole_table = ThreadPoolExecutor(1, "whole-table")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the bundles of a `ModelChoice` into service; requests go on meanwhile.

        A choice that is overtaken by a later one while it loads comes to nothing.
        """
        self._choices += 1
        turn = self._choices
        choice = ModelChoice.read(user_config)
        served = {}
        for name, folder in choice.bundles.items():
            facts = await self._models.describe.remote(str(folder))
            found = facts["calibration"]
            calibration = Calibration.model_validate(found) if found is not None else None
            handle = self._models.options(multiplexed_model_id=facts["model"])
            await handle.load.remote(facts["model"])
            threshold = choice.threshold_of(folder, calibration)
            served[name] = Served(name, fingerprint(facts["model"]), handle, threshold, facts)
        if turn == self._choices:
            self._served, self._user_config = served, user_config

    async def reload(self) -> None:
        """Look at the bundles again; on any error those in service stay."""
        await self.reconfigure(self._user_config)

    def check_health(self) -> None:
        """Serve's own probe: restart this replica when its database does not answer."""
        self._enrolments.check()

    async def ready(self) -> None:
        """A replica answers for the default model."""
        default = self._model(None)
        async with asyncio.timeout(5.0):
            await answered(default.handle.load.remote(default.facts["model"]))
        await asyncio.to_thread(self._enrolments.check)

    def routes(self) -> APIRouter:
        """The operations, bound to this replica."""
        router = APIRouter(
            tags=["speaker"],
            form_limits={
                "max_files": self._settings.max_recordings,
                "max_fields": 10,
                "max_part_size": 4096,
            },
        )
        add = partial(router.add_api_route, dependencies=[Depends(only_known_fields)])
        add("/enroll", self.enroll, methods=["POST"], summary="Remember a speaker's voice")
        add("/verify", self.verify, methods=["POST"], summary="Is it this speaker's voice?")
        add("/identify", self.identify, methods=["POST"], summary="Whose voice is it?")
        add("/embed", self.embed, methods=["POST"], summary="A voice as a vector")
        add("/speakers", self.speakers, methods=["GET"], summary="Who is enrolled")
        add("/speakers/{speaker}", self.remove, methods=["DELETE"], summary="Forget a speaker")
        add("/models", self.models, methods=["GET"], summary="What is served, and how it decides")
        if self._settings.demo:
            router.include_router(demo_routes(_DEMO))
        return router

    # ------------------------------------------------------------------------------ operations

    async def enroll(self, speaker: SpeakerId, audio: Audio, model: ModelName = None) -> Enrolled:
        """Enrol one or several recordings of a speaker; more may follow later."""
        served = self._model(model)
        contents = await self._read(audio)
        made = await self._embed(served, contents)
        recordings = [
            Recording(
                digest=hashlib.sha256(content).hexdigest(), vector=vector, seconds=each.seconds
            )
            for content, (each, vector) in zip(contents, made, strict=True)
        ]
        try:
            count = await asyncio.to_thread(
                self._enrolments.add, served.fingerprint, speaker, recordings
            )
        except FullError as reason:
            raise refuse(409, "full", str(reason)) from None
        seconds = sum(each.seconds for each in recordings)
        return Enrolled(speaker=speaker, model=served.name, recordings=count, seconds=seconds)

    async def verify(
        self,
        audio: Audio,
        speaker: Annotated[str | None, Form(pattern=ID)] = None,
        model: ModelName = None,
    ) -> Verified:
        """Compare recordings with an enrolled speaker, or two recordings with each other."""
        served = self._model(model)
        if speaker is None and len(audio) != 2:
            raise refuse(
                422, "invalid", f"without a speaker, verify wants two recordings, not {len(audio)}"
            )
        # Asked first: a name that nobody has need not cost an embedding.
        reference = await self._reference(served, speaker) if speaker is not None else None
        vectors = [vector for _, vector in await self._embed(served, await self._read(audio))]
        if reference is None:
            score = float(unit(vectors[0]) @ unit(vectors[1]))
        else:
            score = float(reference @ pooled(vectors))
        accept = score >= served.threshold
        return Verified(score=score, accept=accept, threshold=served.threshold, model=served.name)

    async def identify(
        self,
        audio: Audio,
        top: Annotated[int, Form(ge=1, le=100, description="how many candidates")] = 5,
        model: ModelName = None,
    ) -> Identified:
        """The enrolled speakers whose voices are nearest, best first."""
        served = self._model(model)
        made = await self._embed(served, await self._read(audio))
        probe = pooled([vector for _, vector in made])
        candidates = await asyncio.get_running_loop().run_in_executor(
            self._whole_table, self._nearest, served, probe, top
        )
        return Identified(candidates=candidates, threshold=served.threshold, model=served.name)

    async def embed(self, audio: Audio, model: ModelName = None) -> Embeddings:
        """The embedding of each recording, and of all together."""
        served = self._model(model)
        made = await self._embed(served, await self._read(audio))
        vectors = [vector for _, vector in made]
        return Embeddings(
            embedding=pooled(vectors).tolist(),
            embeddings=[unit(vector).tolist() for vector in vectors],
            seconds=[each.seconds for each, _ in made],
            model=served.name,
        )

    async def speakers(self) -> dict[str, list[dict[str, Any]]]:
        """Every enrolled speaker with the models that know them."""
        rows = await asyncio.get_running_loop().run_in_executor(
            self._whole_table, self._enrolments.speakers
        )
        names = {each.fingerprint: each.name for each in self._served.values()}
        for row in rows:
            row["model"] = names.get(row["model"])  # null: enrolled with a model not served now
        return {"speakers": rows}

    async def remove(
        self, speaker: Annotated[str, PathParameter(pattern=ID)]
    ) -> dict[str, str | int]:
        """Forget all recordings of a speaker, under every model."""
        removed = await asyncio.to_thread(self._enrolments.remove, speaker)
        if not removed:
            raise unknown(speaker)
        return {"speaker": speaker, "recordings": removed}

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """The bundles in service; the first is the default."""
        return {
            "models": [
                {
                    "name": each.name,
                    "fingerprint": each.fingerprint,
                    "threshold": each.threshold,
                    "dimensions": each.facts["dimensions"],
                    "calibration": each.facts["calibration"],
                }
                for each in self._served.values()
            ]
        }

    # ----------------------------------------------------------------------------------- parts

    def _model(self, name: str | None) -> Served:
        """The bundle that a request asks for."""
        served = self._served
        if name is None:
            return next(iter(served.values()))
        if name not in served:
            raise refuse(404, "unknown_model", f"the models here are: {', '.join(served)}")
        return served[name]

    async def _read(self, audio: Sequence[UploadFile]) -> list[bytes]:
        """The uploaded files, all together no larger than the gate lets a body be."""
        return [await each.read() for each in audio]

    async def _embed(
        self, served: Served, contents: Sequence[bytes]
    ) -> list[tuple[Embedded, np.ndarray]]:
        """Embed recordings; a refused one refuses the request."""

        async def ask() -> list[Embedded]:
            made: list[Embedded] = await answered(served.handle.embed.remote(list(contents)))
            return made

        found = await tried(ask)
        made = []
        for place, each in enumerate(found):
            if each.vector is None:
                raise refuse(422, "invalid_audio", f"audio[{place}]: {each.refused}")
            made.append((each, each.vector))
        return made

    async def _reference(self, served: Served, speaker: str) -> np.ndarray:
        """The pooled embedding of an enrolled speaker; 404 or 409 if there is none."""
        found = await asyncio.to_thread(self._enrolments.reference, served.fingerprint, speaker)
        if found is None:
            if await asyncio.to_thread(self._enrolments.known, speaker):
                said = (
                    f"'{speaker}' was enrolled with another model, whose scores can't be compared"
                )
                raise refuse(409, "other_model", f"{said}; enrol again with this one")
            raise unknown(speaker)
        return found

    def _nearest(self, served: Served, probe: np.ndarray, top: int) -> list[Candidate]:
        names, gallery = self._enrolments.gallery(served.fingerprint)
        if not names:
            return []
        scores = gallery @ probe
        best = np.argsort(-scores, kind="stable")[:top]
        return [
            Candidate(
                speaker=names[place],
                score=float(scores[place]),
                accept=bool(scores[place] >= served.threshold),
            )
            for place in best
        ]


def unknown(speaker: str) -> HTTPException:
    """The error for a speaker that nobody enrolled."""
    return refuse(404, "unknown_speaker", f"no speaker '{speaker}' is enrolled")


# ---------------------------------------------------------------------------------- deployment


def application(args: SpeakerSettings | Mapping[str, Any]) -> serve.Application:
    """The Serve application: `import_path: goldcrest.pipelines.endpoints.speaker:application`.

    `args` are the settings, or their mapping in a Serve config: Serve makes settings of it only
    for annotations that are classes, not for postponed ones.
    """
    settings = SpeakerSettings.model_validate(args)
    models: Any = serve.deployment(
        SpeakerModels, name="SpeakerModels", user_config=settings.models, **model_options(settings)
    )
    endpoint = ingress(SpeakerEndpoint, settings, user_config=settings.models)
    return endpoint.bind(
        settings,
        models.bind(
            max_seconds=settings.max_seconds,
            min_seconds=settings.min_seconds,
            max_batch=settings.max_batch,
            cpus=settings.cpus,
            gpus=settings.gpus,
        ),
    )


SERVED = ServedKind(
    endpoint=SpeakerEndpoint.__name__,
    models=SpeakerModels.__name__,
    settings=SpeakerSettings,
    choice=ModelChoice,
    application=application,
    members=members,
    identity=model_id,
    check=check_choice,
)

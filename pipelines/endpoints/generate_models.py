"""The model side of the generate endpoint: prompts (or speech) in, text out, whole or in pieces.

Replicas hold several bundles at once (Serve's multiplexing, least recently used out). Tokens are
counted here, as the HTTP side has no tokenizer: what does not fit comes back as `Refused`, in a
stream as its first and only item, so that the caller still gets a status.

When the caller goes away Serve cancels the call, and the model stops before its next token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from ray import serve

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.runtime import limit_threads
from goldcrest.pipelines.endpoints import bundles
from goldcrest.pipelines.endpoints.bundles import BundleChoice
from goldcrest.pipelines.endpoints.generate_batches import Batches
from goldcrest.pipelines.endpoints.generate_prompts import Prompt, PromptReader
from goldcrest.tasks.data.audio import SAMPLE_RATE, AudioError, AudioLimits, decode
from goldcrest.tasks.language.bundle import read_description
from goldcrest.tasks.language.generation import (
    FinishReason,
    Generation,
    GenerationSettings,
    Generator,
)
from goldcrest.tasks.language.quality import load_on
from goldcrest.tasks.language.transcription import Transcriber

MAX_MODEL_BYTES = 256 << 30
FAMILIES = ("causal", "seq2seq", "speech")  # those that write text after a prompt, or audio
_FILES = ("bundle.json", "config.json", "generation_config.json", "model.safetensors")


@dataclass(frozen=True)
class Job:
    """One request: `choices` answers to every prompt, each with a seed of its own."""

    prompts: tuple[Prompt, ...]
    settings: GenerationSettings  # of the first answer; max_new_tokens: the most that is allowed
    max_tokens: int | None = None  # None: as many as are allowed and fit
    choices: int = 1


@dataclass(frozen=True)
class Refused:
    """Why a request can't be answered."""

    code: str
    message: str
    param: str


@dataclass(frozen=True)
class Completed:
    """The answers to all prompts of a request, `choices` for each in order."""

    answers: list[Generation]
    prompt_tokens: int


@dataclass(frozen=True)
class Begun:
    """The first item of a stream."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """What has been added to the answer number `index`: text, and how many tokens it took."""

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Prepared:
    """A prompt as the model will read it."""

    tokens: list[int]
    settings: GenerationSettings


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory."""

    generator: Generator
    reader: PromptReader | None  # None: it hears audio


class _RefusedError(Exception):
    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.reason = Refused(code, message, param)


def members(folder: Path) -> list[str]:
    """Files of a bundle that serving reads."""
    tokenizer = folder / "tokenizer"
    found = sorted(each for each in tokenizer.glob("*") if each.is_file())
    return [*_FILES, *(f"tokenizer/{each.name}" for each in found)]


def model_id(folder: Path) -> str:
    """`fingerprint@folder` of a language bundle."""
    return bundles.model_id(folder, members(folder), max_bytes=MAX_MODEL_BYTES)


def check_choice(choice: BundleChoice) -> None:
    """InputError where a bundle is none, or not of a family that writes text after a prompt."""
    for folder in choice.bundles.values():
        family = read_description(folder)["family"]
        if family not in FAMILIES:
            raise InputError(
                f"the bundle {folder} is of the family '{family}', which writes no text",
                hint=f"the generate endpoint serves: {', '.join(FAMILIES)}",
            )


class TextModels:
    """A replica with some loaded bundles; a deployment by `generate.application`."""

    def __init__(
        self, *, max_context: int, parallel: int, max_batch: int, cpus: float, gpus: float = 0.0
    ) -> None:
        limit_threads(cpus)
        self._max_context, self._max_batch = max_context, max_batch
        self._device = "cuda" if gpus else "cpu"
        self._batches = Batches(places=parallel, max_batch=max_batch)
        self._warm: WeakValueDictionary[str, Loaded] = WeakValueDictionary()  # those that ran

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Have every bundle of the choice in memory: Serve sends a model's requests to replicas
        that hold it, so one that started without would never be asked."""
        folders = BundleChoice.read(user_config).bundles.values()
        bundles.hold(self, bundles.MOST_HELD)
        for folder in folders:
            await self.load(await asyncio.to_thread(model_id, folder))
        bundles.hold(self, 2 * len(folders))  # these, and those that replace them

    async def describe(self, folder: str) -> dict[str, Any]:
        """What a bundle is: its `model` id and facts; InputError when it is none."""
        return await asyncio.to_thread(_describe, Path(folder))

    async def load(self, model: str) -> None:
        """Have a bundle in memory and run once: the first request finds it warm."""
        loaded = await self._model(model)
        if self._warm.get(model) is not loaded:
            settings = GenerationSettings(max_new_tokens=2)
            first = await asyncio.to_thread(_something, loaded)
            await self._batches.answer(model, loaded.generator, first, settings)
            self._warm[model] = loaded

    async def complete(self, job: Job) -> Completed | Refused:
        """All answers at once."""
        model = serve.get_multiplexed_model_id()
        loaded = await self._model(model)
        try:
            prepared = await asyncio.to_thread(self._prepare, loaded, job)
        except _RefusedError as refused:
            return refused.reason
        answers = [
            self._batches.answer(model, loaded.generator, each.tokens, settings)
            for each, settings in _choices(prepared, job.choices)
        ]
        return Completed(list(await asyncio.gather(*answers)), _count(prepared))

    async def transcribe(self, recording: bytes, max_tokens: int) -> Completed | Refused:
        """What is said in an encoded recording that fits the model's window."""
        model = serve.get_multiplexed_model_id()
        generator = (await self._model(model)).generator
        if not isinstance(generator, Transcriber):
            said = "this model reads text, not audio: ask it by /v1/completions"
            return Refused("not_speech", said, "model")
        try:
            heard: Any = await asyncio.to_thread(_heard, generator, recording)
        except (AudioError, InputError) as reason:
            return Refused("invalid_audio", str(reason), "file")
        settings = GenerationSettings(max_new_tokens=max_tokens)
        answer = await self._batches.answer(model, generator, heard, settings)
        return Completed([answer], answer.prompt_tokens)

    async def stream(self, job: Job) -> AsyncIterator[Begun | Delta | Refused]:
        """The same answers one after the other, while they are made."""
        loaded = await self._model(serve.get_multiplexed_model_id())
        try:
            prepared = await asyncio.to_thread(self._prepare, loaded, job)
        except _RefusedError as refused:
            yield refused.reason
            return
        yield Begun(_count(prepared))
        for index, (each, settings) in enumerate(_choices(prepared, job.choices)):
            news = self._batches.pieces(loaded.generator, each.tokens, settings)
            async with aclosing(news):
                async for pieces in news:
                    text = "".join(piece.text for piece in pieces)
                    tokens = sum(piece.token is not None for piece in pieces)
                    yield Delta(index, text, tokens, pieces[-1].finish_reason)

    def _prepare(self, loaded: Loaded, job: Job) -> list[Prepared]:
        """Every prompt as tokens that fit; _RefusedError if one won't do."""
        return [self._prepare_one(loaded, job, prompt) for prompt in job.prompts]

    def _prepare_one(self, loaded: Loaded, job: Job, prompt: Prompt) -> Prepared:
        if loaded.reader is None:
            said = "this model hears audio: send it to /v1/audio/transcriptions"
            raise _RefusedError("not_text", said, "model")
        generator, settings = loaded.generator, job.settings
        param = "messages" if prompt and isinstance(prompt[0], Mapping) else "prompt"
        try:
            ids, stops = loaded.reader.read(prompt)
        except InputError as error:
            raise _RefusedError("invalid_prompt", str(error), param) from None
        context = min(generator.context or self._max_context, self._max_context)
        if generator.family == "causal":
            room, limits = context - len(ids), f"{context} tokens"
        else:  # an encoder's context is its own
            room = min(generator.longest_answer or self._max_context, self._max_context)
            limits = f"{context} tokens of the prompt and {room} of the answer"
        wanted = job.max_tokens or max(1, min(settings.max_new_tokens, room))
        if len(ids) > context or wanted > room:
            raise _RefusedError(
                "context_length_exceeded",
                f"the model's context is {limits}; the prompt has {len(ids)}, and "
                f"{wanted} more are wanted for the answer",
                param,
            )
        try:
            tokens = generator.encode(ids)
        except InputError as error:
            raise _RefusedError("empty_prompt", str(error), param) from None
        update = {"max_new_tokens": wanted, "stop": (*settings.stop, *stops)}
        return Prepared(tokens, settings.model_copy(update=update))

    @serve.multiplexed(max_num_models_per_replica=bundles.MOST_HELD)  # type: ignore[untyped-decorator]
    async def _model(self, model: str) -> Loaded:
        """Load a bundle; the id names the content, so a folder that changed is another model."""
        return await asyncio.to_thread(_load, model, self._max_batch, self._device)


def _count(prepared: Sequence[Prepared]) -> int:
    return sum(len(each.tokens) for each in prepared)


def _choices(
    prepared: Sequence[Prepared], choices: int
) -> list[tuple[Prepared, GenerationSettings]]:
    """Every answer to be made, with a seed of its own: prompts that are alike are sampled apart."""
    return [
        (each, each.settings.model_copy(update={"seed": each.settings.seed + first + number}))
        for first, each in zip(range(0, len(prepared) * choices, choices), prepared, strict=True)
        for number in range(choices)
    ]


def _load(model: str, max_batch: int, device: str) -> Loaded:
    """The bundle on the device, where it can compute there (INT8 is the CPU's)."""
    folder = bundles.folder_of(model)
    if model_id(folder) != model:
        raise InputError(f"the bundle {folder} has changed since it was taken into service")
    bundle = load_on(folder, device)
    if bundle.facts["family"] == "speech":
        return Loaded(Transcriber(bundle, batch_size=max_batch), None)
    generator = Generator(bundle, batch_size=max_batch)
    return Loaded(generator, PromptReader(generator.bundle))


def _something(loaded: Loaded) -> Any:
    """What a model can be run on once: a letter, or a tenth of a second of noise."""
    if loaded.reader is not None:
        return loaded.reader.read("a")[0]
    assert isinstance(loaded.generator, Transcriber)
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE // 10).astype(np.float32) / 10
    return loaded.generator.hear([noise])[0]


def _heard(transcriber: Transcriber, recording: bytes) -> np.ndarray:
    """The features of a recording; AudioError for one that is none, or too long."""
    limits = AudioLimits(max_seconds=transcriber.frames / 100, max_channels=8)
    longest = transcriber.frames * SAMPLE_RATE // 100  # resampling may add a sample
    return transcriber.hear([decode(recording, limits)[:longest]])[0]


def _describe(folder: Path) -> dict[str, Any]:
    facts = read_description(folder)
    changed = (folder / "bundle.json").stat().st_mtime
    return {
        "model": model_id(folder),
        "name": facts["name"],
        "family": facts["family"],
        "architecture": facts["architecture"],
        "parameters": facts.get("parameters"),
        "created": int(changed),
    }

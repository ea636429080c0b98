"""The model side of the generate endpoint: prompts in, text out, whole or piece by piece.

Replicas hold several bundles at once (Serve's multiplexing, least recently used out). Tokens are
counted here, as the HTTP side has no tokenizer: what does not fit comes back as `Refused`, in a
stream as its first and only item, so that the caller still gets a status.

When the caller goes away Serve cancels the call, and the model stops before its next token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.runtime import limit_threads
from goldcrest.pipelines.endpoints import bundles
from goldcrest.pipelines.endpoints.bundles import BundleChoice
from goldcrest.pipelines.endpoints.generate_batches import Batches
from goldcrest.pipelines.endpoints.generate_chat import Turn, chat_prompt
from goldcrest.tasks.language.bundle import load_bundle, read_description
from goldcrest.tasks.language.generation import (
    FinishReason,
    Generation,
    GenerationSettings,
    Generator,
)

MAX_MODEL_BYTES = 256 << 30
FAMILIES = ("causal", "seq2seq")  # those that write text after a prompt
_FILES = ("bundle.json", "config.json", "generation_config.json", "model.safetensors")

Prompt = str | tuple[Turn, ...]


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

    text: str
    settings: GenerationSettings
    tokens: int


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

    def __init__(self, *, max_context: int, parallel: int, max_batch: int, cpus: float) -> None:
        limit_threads(cpus)
        self._max_context = max_context
        self._batches = Batches(places=parallel, max_batch=max_batch)
        self._warm: set[str] = set()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Have every bundle of the choice in memory: Serve sends a model's requests to replicas
        that hold it, so one that started without would never be asked."""
        for folder in BundleChoice.read(user_config).bundles.values():
            await self.load(await asyncio.to_thread(model_id, folder))

    async def describe(self, folder: str) -> dict[str, Any]:
        """What a bundle is: its `model` id and facts; InputError when it is none."""
        return await asyncio.to_thread(_describe, Path(folder))

    async def load(self, model: str) -> None:
        """Have a bundle in memory and run once: the first request finds it warm."""
        generator = await self._model(model)
        if model not in self._warm:
            settings = GenerationSettings(max_new_tokens=2)
            await self._batches.answer(model, generator, "a", settings)
            self._warm.add(model)

    async def complete(self, job: Job) -> tuple[list[Generation], int] | Refused:
        """The answers to all prompts, `choices` for each in order, and the prompts' tokens."""
        model = serve.get_multiplexed_model_id()
        generator = await self._model(model)
        try:
            prepared = await asyncio.to_thread(self._prepare, generator, job)
        except _RefusedError as refused:
            return refused.reason
        answers = [
            self._batches.answer(model, generator, each.text, settings)
            for each, settings in _choices(prepared, job.choices)
        ]
        return list(await asyncio.gather(*answers)), sum(each.tokens for each in prepared)

    async def stream(self, job: Job) -> AsyncIterator[Begun | Delta | Refused]:
        """The same answers one after the other, while they are made."""
        generator = await self._model(serve.get_multiplexed_model_id())
        try:
            prepared = await asyncio.to_thread(self._prepare, generator, job)
        except _RefusedError as refused:
            yield refused.reason
            return
        yield Begun(sum(each.tokens for each in prepared))
        for index, (each, settings) in enumerate(_choices(prepared, job.choices)):
            async with aclosing(self._batches.pieces(generator, each.text, settings)) as news:
                async for pieces in news:
                    text = "".join(piece.text for piece in pieces)
                    tokens = sum(piece.token is not None for piece in pieces)
                    yield Delta(index, text, tokens, pieces[-1].finish_reason)

    def _prepare(self, generator: Generator, job: Job) -> list[Prepared]:
        """Every prompt as text whose tokens have been counted; _RefusedError if one won't do."""
        return [self._prepare_one(generator, job, prompt) for prompt in job.prompts]

    def _prepare_one(self, generator: Generator, job: Job, prompt: Prompt) -> Prepared:
        settings, param = job.settings, "prompt"
        if not isinstance(prompt, str):
            param = "messages"
            try:
                prompt, stops = chat_prompt(generator.tokenizer, prompt)
            except InputError as error:
                raise _RefusedError("invalid_messages", str(error), param) from None
            settings = settings.model_copy(update={"stop": (*settings.stop, *stops)})
        try:
            tokens = len(generator.encode(prompt))
        except InputError as error:
            code = "context_length_exceeded" if prompt else "empty_prompt"
            raise _RefusedError(code, str(error), param) from None
        context = min(generator.context or self._max_context, self._max_context)
        beside = tokens if generator.family == "causal" else 0  # an encoder has a context of its own
        wanted = job.max_tokens or min(settings.max_new_tokens, context - beside)
        if tokens > context or wanted < 1 or beside + wanted > context:
            raise _RefusedError(
                "context_length_exceeded",
                f"the model's context is {context} tokens; the prompt has {tokens}, and "
                f"{job.max_tokens or 1} are wanted for the answer",
                param,
            )
        return Prepared(prompt, settings.model_copy(update={"max_new_tokens": wanted}), tokens)

    @serve.multiplexed(max_num_models_per_replica=4)  # type: ignore[untyped-decorator]
    async def _model(self, model: str) -> Generator:
        """Load a bundle; the id names the content, so a folder that changed is another model."""
        return await asyncio.to_thread(_load, model)


def _choices(prepared: Sequence[Prepared], choices: int) -> list[tuple[Prepared, GenerationSettings]]:
    """Every answer to be made, with a seed of its own."""
    return [
        (each, each.settings.model_copy(update={"seed": each.settings.seed + number}))
        for each in prepared
        for number in range(choices)
    ]


def _load(model: str) -> Generator:
    folder = bundles.folder_of(model)
    if model_id(folder) != model:
        raise InputError(f"the bundle {folder} has changed since it was taken into service")
    return Generator(load_bundle(folder))


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

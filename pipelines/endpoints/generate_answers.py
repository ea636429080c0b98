"""Answers of OpenAI's interface: whole ones, and the events of streamed ones.

Source: https://platform.openai.com/docs/api-reference (completions, chat, models). Both kinds of
requests differ in little: how a choice holds its text, and what an object is called.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from goldcrest.pipelines.endpoints.generate_models import Delta
from goldcrest.tasks.language.generation import Generation

Finish = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = Field(description="of all choices, without those that end a text")
    total_tokens: int


class TextChoice(BaseModel):
    """One answer to a prompt."""

    text: str
    index: int
    logprobs: None = None
    finish_reason: Finish = Field(description="stop: the text ended; length: the room did")


class Completion(BaseModel):
    """Answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str
    system_fingerprint: str = Field(description="of the bundle's content")
    choices: list[TextChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One turn that the assistant might take."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Transcription(BaseModel):
    """Answer of `/v1/audio/transcriptions`."""

    text: str
    model: str


class ModelCard(BaseModel):
    """One bundle in service."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when it was taken into service, seconds since 1970")
    owned_by: str = "goldcrest"
    architecture: str
    family: str
    parameters: int | None
    fingerprint: str


class ModelList(BaseModel):
    """Answer of `/v1/models`; the first is the default."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """The two counts and their sum."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of one answer begin with."""

    chat: bool
    model: str
    fingerprint: str
    with_usage: bool = False  # a stream's
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """The fields of a whole answer, other than its choices and usage."""
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint}",
        }

    def whole(self, answers: Sequence[Generation], used: Usage) -> Completion | ChatCompletion:
        """The answer to a request that is not streamed."""
        if self.chat:
            turns = [
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=each.text),
                    finish_reason=finish(each.finish_reason),
                )
                for index, each in enumerate(answers)
            ]
            return ChatCompletion(**self.fields(), choices=turns, usage=used)
        texts = [
            TextChoice(text=each.text, index=index, finish_reason=finish(each.finish_reason))
            for index, each in enumerate(answers)
        ]
        return Completion(**self.fields(), choices=texts, usage=used)

    # ------------------------------------------------------------------------------- streams

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        """Events before any text: in a chat, whose turn it is."""
        if self.chat:
            for index in range(choices):
                yield self._event(index, {"role": "assistant", "content": ""}, None)

    def more(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Events of what was added to one answer; why it ended comes in the last of them."""
        reason = None if delta.finish_reason is None else finish(delta.finish_reason)
        if not self.chat:
            if delta.text or reason:
                yield self._event(delta.index, delta.text, reason)
            return
        if delta.text:
            yield self._event(delta.index, {"content": delta.text}, None)
        if reason:
            yield self._event(delta.index, {}, reason)

    def last(self, used: Usage) -> Iterator[dict[str, Any]]:
        """Events after all text: the count of tokens, where it was asked for."""
        if self.with_usage:
            yield self._named([], used.model_dump())

    def _event(self, index: int, content: Any, reason: Finish | None) -> dict[str, Any]:
        """One event; `content` is the text, or in a chat what is new of the turn."""
        choice = {
            "index": index,
            "delta" if self.chat else "text": content,
            "logprobs": None,
            "finish_reason": reason,
        }
        return self._named([choice], None)

    def _named(self, choices: list[dict[str, Any]], used: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        made = {**self.fields(), "object": kind, "choices": choices}
        return {**made, "usage": used} if self.with_usage else made


def finish(reason: str) -> Finish:
    """A reason as the interface names it; an answer that was called off has no reader."""
    return "stop" if reason == "stop" else "length"

"""Requests of OpenAI's interface, as far as this endpoint answers them.

Source: https://platform.openai.com/docs/api-reference (completions, chat). Names, defaults and
limits are theirs. A field that asks for something that is not built is refused in words unless it
has the value that asks for nothing: an answer that silently lacks what was asked for is worse than
none. Types are strict: "5" is no number and true is no 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters
MAX_MESSAGES = 1024
_SEEDS = 2**63

# What the fields that are not built may be, other than null: the value that asks for (or says)
# nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
}


def wrong(words: str) -> PydanticCustomError:
    """A field is wrong, in words (without braces) that stand as they are in the answer."""
    return PydanticCustomError("wrong", words)


# ------------------------------------------------------------------------------------- fields


def _text(value: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong("holds an unpaired surrogate: that is no text") from None
    return value


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """A text or several, each also as its tokens."""
    several = [value] if isinstance(value, str) or _are(int, value) else value
    if isinstance(several, list) and several:
        if _are(str, several):
            return [_text(each) for each in several]
        if all(_are(int, each) for each in several):
            return [tuple(each) for each in several]
    raise wrong("wants a text, a list of tokens, or a list of one kind of these")


def _are(kind: type, value: Any) -> bool:
    """Whether a value is a list of one item of a kind or more; true and false are no numbers."""
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)


def _stops(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise wrong("wants a text, or a list of texts")
    if len(texts) > MAX_STOPS:
        raise wrong(f"wants {MAX_STOPS} texts at most, not {len(texts)}")
    if not all(1 <= len(each) <= MAX_STOP_LENGTH for each in texts):
        raise wrong(f"wants texts of 1 to {MAX_STOP_LENGTH} characters")
    return [_text(each) for each in texts]


def _content(value: Any) -> str:
    """A message's text, or its text parts one after the other."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise wrong("wants a text, or a list of text parts")
    for part in value:
        if part.get("type") != "text":
            raise wrong("only parts of type 'text' are built here")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise wrong("a text part has 'type' and 'text' and nothing else")
    return _text("".join(part["text"] for part in value))


def _nothing(value: Any, info: ValidationInfo) -> None:
    """The value of a field that is not built: null, or another that asks for nothing."""
    neutral = _NEUTRAL[str(info.field_name)]
    if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
        raise wrong("is not built here: leave it out")


Prompts = Annotated[list[str | tuple[int, ...]], BeforeValidator(_prompts)]
Stops = Annotated[list[str], BeforeValidator(_stops)]
Content = Annotated[str, BeforeValidator(_content)]
NotBuilt = Annotated[None, Field(description="not built: leave it out")]


class StreamOptions(BaseModel):
    """What a stream brings beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="a last event counts the tokens")
    include_obfuscation: Literal[False] = Field(
        False, description="random padding of events is not built"
    )


class GenerateRequest(BaseModel):
    """Fields that both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(
        None, max_length=64, description="which bundle [default: the first]; /v1/models lists them"
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="longest answer, tokens")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token [default: 1]"
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="sample among the fewest tokens of this probability [default: 1]",
    )
    n: int | None = Field(None, ge=1, le=128, description="answers to each prompt [default: 1]")
    stop: Stops = Field([], description="texts that end the answer; they are not part of it")
    seed: int | None = Field(
        None, ge=-_SEEDS, lt=_SEEDS, description="the same seed gives the same answer"
    )
    stream: bool | None = Field(None, description="send the answer while it is made")
    stream_options: StreamOptions | None = Field(None, description="only with `stream`")
    user: str | None = Field(None, max_length=512, description="accepted; nothing is done with it")

    frequency_penalty: NotBuilt = None
    logit_bias: NotBuilt = None
    logprobs: NotBuilt = None
    presence_penalty: NotBuilt = None

    @field_validator(*_NEUTRAL, mode="before", check_fields=False)
    @classmethod
    def _not_built(cls, value: Any, info: ValidationInfo) -> None:
        _nothing(value, info)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options is only for requests with stream: true")
        if self.choices > 1 and self.greedy:
            raise wrong("with temperature 0 all n answers are the same: leave n at 1")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def limited_by(self) -> str:
        """Which field says how long the answer may be."""
        return "max_tokens"

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerateRequest):
    """Body of `/v1/completions`."""

    prompt: Prompts = Field(description="the text to go on with, as text or tokens; or several")

    best_of: NotBuilt = None
    echo: NotBuilt = None
    suffix: NotBuilt = None


class Message(BaseModel):
    """One turn of a conversation.

    An answer's message may be sent back as it came: what its clients add to its text is null or
    empty. `name` is taken and not used: a play has no place for it, most templates neither.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(description="text, or a list of parts of type `text`")
    name: str | None = Field(None, max_length=64, description="accepted; nothing is done with it")

    annotations: NotBuilt = None
    audio: NotBuilt = None
    function_call: NotBuilt = None
    refusal: NotBuilt = None
    tool_calls: NotBuilt = None

    @field_validator("annotations", "tool_calls", mode="before")
    @classmethod
    def _empty(cls, value: Any, info: ValidationInfo) -> None:
        _nothing(value, info)


class ChatRequest(GenerateRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="the conversation so far"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="the newer name of max_tokens"
    )

    function_call: NotBuilt = None
    functions: NotBuilt = None
    metadata: NotBuilt = None
    modalities: NotBuilt = None
    parallel_tool_calls: NotBuilt = None
    prediction: NotBuilt = None
    reasoning_effort: NotBuilt = None
    response_format: NotBuilt = None
    service_tier: NotBuilt = None
    store: NotBuilt = None
    tool_choice: NotBuilt = None
    tools: NotBuilt = None
    top_logprobs: NotBuilt = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise wrong("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def turns(self) -> tuple[dict[str, str], ...]:
        """The messages for the model: a template may ask whether any other field is there."""
        return tuple({"role": each.role, "content": each.content} for each in self.messages)

    @property
    def limited_by(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens, None: as long as there is room."""
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens

"""What a request may say: OpenAI's fields, their limits, and words for what is not built."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from goldcrest.pipelines.endpoints.generate_answers import AssistantMessage
from goldcrest.pipelines.endpoints.generate_requests import ChatRequest, CompletionRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)


def said(**body: Any) -> str:
    """What a completion request is refused for, `field: words`."""
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": "a", **body})
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in refused.value.errors()
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_prompts_are_texts_or_tokens(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], [[]], ["a", 5], ["a", [5]], [5, "a"], [True], [5.0], {"a": 1}, [[5, "a"]]],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert said(prompt=prompt).startswith("prompt: wants a text")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": -0.01}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 129}, "n: "),
        ({"n": 2, "temperature": 0}, "leave n at 1"),
        ({"stop": ["a"] * 5}, "4 texts at most"),
        ({"stop": [""]}, "1 to 256 characters"),
        ({"stop": "x" * 257}, "1 to 256 characters"),
        ({"stop": [5]}, "stop: wants a text"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "only for requests with stream"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"model": "m" * 65}, "model"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"prompt": "\ud800"}, "unpaired surrogate"),
        ({"stop": "\udfff"}, "unpaired surrogate"),
    ],
)
def test_limits(body: dict[str, Any], words: str) -> None:
    assert words in said(**body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"50256": -100}),
        ("logprobs", 0),  # 0 asks for those of the chosen tokens
        ("logprobs", 5),
        ("presence_penalty", -1),
        ("suffix", "and so on"),
    ],
)
def test_what_is_not_built_is_refused_in_words(name: str, value: Any) -> None:
    assert said(**{name: value}) == f"{name}: is not built here: leave it out"


def test_values_that_ask_for_nothing_are_taken() -> None:
    """Clients of the interface send their own defaults along."""
    body = {"best_of": 1, "echo": False, "frequency_penalty": 0, "presence_penalty": 0.0}
    body |= {"logit_bias": {}, "logprobs": None, "suffix": None, "user": "me", "stop": None}
    body |= {"n": None, "stream": None, "temperature": None, "top_p": None, "seed": None}
    found = CompletionRequest.model_validate({"prompt": "a", **body})
    assert (found.choices, found.greedy, found.stop) == (1, False, [])


@pytest.mark.parametrize(
    "more",
    [
        {"store": False, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True},
        {"store": None, "metadata": None, "reasoning_effort": None, "prediction": None},
        {"tools": [], "tool_choice": "auto", "functions": None, "function_call": "auto"},
    ],
)
def test_chat_clients_send_their_defaults_along(more: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert ChatRequest.model_validate(body | more).choices == 1


@pytest.mark.parametrize(
    "more", [{"store": True}, {"metadata": {"a": "b"}}, {"prediction": {"type": "content"}}]
)
def test_chat_fields_that_ask_for_more_are_refused(more: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(ValidationError, match="is not built here: leave it out"):
        ChatRequest.model_validate(body | more)


def chat(**message: Any) -> ChatRequest:
    """A chat request of one message."""
    return ChatRequest.model_validate({"messages": [{"role": "user", **message}]})


def test_messages_are_text_or_parts_of_text() -> None:
    assert chat(content="hi").messages[0].content == "hi"
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(content=parts).messages[0].content == "hi"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": None},
        {"content": 5},
        {"content": ["hi"]},
        {"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"content": [{"type": "text"}]},
        {"content": [{"type": "text", "text": "a", "more": 1}]},
        {"content": "a", "role": "tool"},
        {"content": "a", "tool_calls": [{"id": "1", "type": "function"}]},
        {"content": "a", "function_call": {"name": "f", "arguments": ""}},
        {"content": "a", "refusal": "no"},
        {"content": "a", "name": 5},
        {"content": "a", "name": "n" * 65},
        {"content": "a", "unheard_of": None},
        {"content": "\ud800"},
    ],
)
def test_other_messages_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"messages\.0"):
        chat(**message)


def test_an_answers_message_may_be_sent_back() -> None:
    """As the endpoint wrote it, and as OpenAI's client does that writes all fields that it knows.
    The model gets the text alone: a template may ask whether there are `tool_calls`."""
    answer = AssistantMessage(content="A bird.").model_dump(mode="json")
    known = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for more in ({}, known, {"tool_calls": [], "annotations": None}):
        turns = [{"role": "user", "content": "a", "name": "anna"}, {**answer, **more}]
        assert ChatRequest.model_validate({"messages": turns}).turns == (
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "A bird."},
        )


def test_the_length_has_two_names() -> None:
    turns = [{"role": "user", "content": "a"}]

    def limit(**body: Any) -> int | None:
        return ChatRequest.model_validate({"messages": turns, **body}).limit

    assert limit() is None
    assert limit(max_tokens=3) == limit(max_completion_tokens=3) == 3
    assert limit(max_tokens=3, max_completion_tokens=3) == 3
    with pytest.raises(ValidationError, match="differ"):
        limit(max_tokens=3, max_completion_tokens=4)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields]),
        JSON,
        max_size=4,
    )
)
def test_any_json_is_taken_or_refused(body: dict[str, Any]) -> None:
    for kind in (CompletionRequest, ChatRequest):
        try:
            found = kind.model_validate(body)
        except ValidationError:
            continue
        assert found.choices >= 1

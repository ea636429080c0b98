"""A conversation as the one text that a language model goes on with.

A model that was trained to chat brings a template (Jinja, run in transformers' sandbox) that writes
turns as they stood in its training. Without one, turns are written as in a play:

    You are a helpful assistant.

    User: What is a goldcrest?
    Assistant: A small songbird.
    User: How small?
    Assistant:

and the answer ends where the model would write the user's next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from goldcrest.cluster.errors import InputError

_NAMES = {"user": "User", "assistant": "Assistant"}
NEXT_TURN = "\nUser:"

Turn = Mapping[str, str]  # role (system, developer, user or assistant), content


def chat_prompt(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, tuple[str, ...]]:
    """The prompt of a conversation, and texts that end the answer beside those asked for.

    Raises InputError where the model's template refuses the conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return plain_prompt(turns), (NEXT_TURN,)
    try:
        prompt = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the model's chat template refuses the messages: {reason}") from error
    return str(prompt), ()


def plain_prompt(turns: Sequence[Turn]) -> str:
    """Turns as in a play; instructions stand as they are, each with an empty line after it."""
    lines = [
        f"{_NAMES[turn['role']]}: {turn['content']}\n"
        if turn["role"] in _NAMES
        else f"{turn['content']}\n\n"
        for turn in turns
    ]
    return "".join([*lines, "Assistant:"])

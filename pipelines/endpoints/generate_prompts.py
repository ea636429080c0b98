"""What a request brings, as the tokens that a language model goes on with.

Plain text is tokenized as it was for training: text that spells a special token stays text.

A model that was trained to chat brings a template (Jinja, run in transformers' sandbox) that writes
turns as they stood in its training, between special tokens. Only the template may write those: a
message that spells one is tokenized by itself, as text, or it could end its own turn and speak for
the system. Without a template, turns are written as in a play:

    You are a helpful assistant.

    User: What is a goldcrest?
    Assistant: A small songbird.
    User: How small?
    Assistant:

and the answer ends where the model would write the user's next turn.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from goldcrest.cluster.errors import InputError
from goldcrest.tasks.language.bundle import LanguageModel
from goldcrest.tasks.language.prompts import encode_prompt
from goldcrest.tasks.language.tokenizer import encode_plain

NEXT_TURN = "\nUser:"
_NAMES = {"user": "User", "assistant": "Assistant"}

Turn = Mapping[str, str]  # role (system, developer, user or assistant), content
Prompt = str | tuple[int, ...] | tuple[Turn, ...]


class PromptReader:
    """Prompts of one model as tokens; may be called in several threads."""

    def __init__(self, bundle: LanguageModel) -> None:
        # A copy of its own, and a lock: what encodes text as plain switches the tokenizer over.
        self._tokenizer = copy.deepcopy(bundle.tokenizer)
        self._bundle = dataclasses.replace(bundle, tokenizer=self._tokenizer)
        self._lock = threading.Lock()
        added = bundle.tokenizer.added_tokens_decoder.values()
        self._special = [str(each) for each in added if each.special]

    def read(self, prompt: Prompt) -> tuple[list[int], tuple[str, ...]]:
        """Tokens, and texts that end the answer beside those that the request names.

        Raises InputError where tokens are none of the model's or its template refuses the turns.
        """
        with self._lock:
            if isinstance(prompt, str):
                return encode_prompt(self._bundle, prompt), ()
            if prompt and isinstance(prompt[0], int):
                return self._checked(prompt), ()
            turns: Any = prompt
            if getattr(self._tokenizer, "chat_template", None) is None:
                return encode_prompt(self._bundle, play(turns)), (NEXT_TURN,)
            return self._templated(turns), ()

    def _checked(self, tokens: Sequence[Any]) -> list[int]:
        size = len(self._tokenizer)
        if not all(0 <= token < size for token in tokens):
            raise InputError(f"the model's tokens are numbered from 0 to {size - 1}")
        return list(tokens)

    def _templated(self, turns: Sequence[Turn]) -> list[int]:
        contents = [turn["content"] for turn in turns]
        if not any(token in text for text in contents for token in self._special):
            return self._with_special(self._render(turns))
        marks = {f"[{secrets.token_hex(16)}]": text for text in contents}
        marked = [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
        parts = re.split(f"({'|'.join(map(re.escape, marks))})", self._render(marked))
        tokens: list[int] = []
        for part in filter(None, parts):
            written = part not in marks
            tokens += self._with_special(part) if written else self._plain(marks[part])
        return tokens

    def _render(self, turns: Sequence[Turn]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"the model's chat template refuses the messages: {reason}") from error

    def _plain(self, text: str) -> list[int]:
        return list(encode_plain(self._tokenizer, [text])[0].ids)

    def _with_special(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def play(turns: Sequence[Turn]) -> str:
    """Turns as in a play; instructions stand as they are, each with an empty line after it.

    A model goes on after `Assistant:` with a space: an answer that is sent back has it already.
    """
    lines = [
        f"{_NAMES[turn['role']]}: {turn['content'].removeprefix(' ')}\n"
        if turn["role"] in _NAMES
        else f"{turn['content']}\n\n"
        for turn in turns
    ]
    return "".join([*lines, "Assistant:"])

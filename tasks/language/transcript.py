"""Text of tokens that come one by one, as far as it is certain.

Two things make text uncertain: a character of several tokens that is not complete (bytes of UTF-8),
and an end of the text that may become part of a stop string. Both are held back until what follows
settles them, so text that was handed out never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Transcript:
    """Tokens in, text out; `ended` once an end token or a stop string came."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: Collection[int]) -> None:
        """`tokenizer` is a fast one of transformers; `ends` are tokens that end the text."""
        self.tokens: list[int] = []
        self.ended = False
        self._cut = False  # by a stop string
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ends = frozenset(ends)
        self._decoded = 0  # characters decoded so far
        self._held = ""  # the last of them, not handed out yet

    def add(self, token: int) -> str:
        """Text that has become certain by one more token; "" once the text has ended."""
        if self.ended or token in self._ends:
            self.ended = True
            return ""
        self.tokens.append(token)
        return self._take(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")

    def finish(self) -> str:
        """What was held back, at the end of the tokens: a broken character becomes U+FFFD."""
        if self._cut:
            return ""
        whole = self._tokenizer.decode(
            self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        certain = self._take(whole[self._decoded :])
        rest, self._held = self._held, ""
        return certain + rest

    def _take(self, text: str) -> str:
        """Text up to a stop string, or up to what may become the beginning of one."""
        self._decoded += len(text)
        self._held += text
        places = [place for each in self._stop if (place := self._held.find(each)) >= 0]
        if places:
            certain, self._held = self._held[: min(places)], ""
            self.ended = self._cut = True
            return certain
        keep = max((overlap(self._held, each) for each in self._stop), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with, fewer than all of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

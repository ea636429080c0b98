"""Text of tokens that come one by one, as far as it is certain.

Two things make text uncertain: a character of several tokens that is not complete (bytes of UTF-8),
and an end of the text that may become part of a stop string. Both are held back until what follows
settles them, so text that was handed out never has to be taken back.

A tokenizer with byte fallback (Llama 2, Mistral, Gemma) decodes a run of byte tokens as a whole: a
byte that fits nowhere makes each byte of the run a U+FFFD, those of complete characters too. What
was handed out stays; only the bytes that were held become U+FFFD.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or not yet one."""


class Transcript:
    """Tokens in, text out; `ended` once an end token or a stop string came."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: Collection[int]) -> None:
        """`tokenizer` is a fast one of transformers; `ends` are tokens that end the text."""
        self.tokens: list[int] = []
        self.ended = False
        self._cut = False  # by a stop string
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._ends = frozenset(ends)
        self._before: list[int] = []  # tokens of the last text that was decoded
        self._pending: list[int] = []  # tokens after them, whose text is not complete
        self._held = ""  # decoded, not handed out yet

    def add(self, token: int) -> str:
        """Text that has become certain by one more token; "" once the text has ended."""
        if self.ended or token in self._ends:
            self.ended = True
            return ""
        self.tokens.append(token)
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(BROKEN):
            return ""
        self._before, self._pending = self._pending, []
        return self._take(text)

    def finish(self) -> str:
        """What was held back, at the end of the tokens: a broken character becomes U+FFFD."""
        if self._cut:
            return ""
        certain = self._take(self._pending_text())
        rest, self._held = self._held, ""
        return certain + rest

    def _pending_text(self) -> str:
        """What the pending tokens add to the text before them.

        They are decoded behind the tokens before them, as many decoders take the space from the
        beginning of a text. If that changes the text before, a run of bytes has broken.
        """
        known = self._decode(self._before)
        text = self._decode(self._before + self._pending)
        return text[len(known) :] if text.startswith(known) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _take(self, text: str) -> str:
        """Text up to a stop string, or up to what may become the beginning of one.

        Of several the one that is complete first, however the text was cut into tokens.
        """
        self._held += text
        found = [(self._held.find(each), len(each)) for each in self._stop if each in self._held]
        if found:
            place, _ = min(found, key=lambda each: (sum(each), each))
            certain, self._held = self._held[:place], ""
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

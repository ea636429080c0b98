"""Packing: documents one after the other in rows of a fixed length, borders kept.

Padding every document to the longest wastes most of a batch. Rows are filled to the brim instead
(T. Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B), a document that does
not fit goes on in the next row, and the places where documents start are kept, so that attention
can stay inside of documents (tasks/language/batches.py).

A document that goes on repeats its last token as the first of the next row. It is context there, so
every token is predicted exactly once, whatever the length of rows: perplexity and bits per
character count the same text. A masked model predicts tokens from both sides, the first of a row
too, so nothing is repeated for it.

Rows of one document each are for models that can't keep documents apart (documents.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from goldcrest.tasks.data.tokens import TokenRow


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Tokens (N,) int32 of a text, and how much of it each of them and those before it cover:
    `characters` (N,) and `bytes` (N,), int64, growing. A special token adds nothing.
    """

    tokens: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def then(self, other: EncodedText) -> EncodedText:
        """This text with another behind it."""
        ends = [int(each[-1]) if len(each) else 0 for each in (self.characters, self.bytes)]
        return EncodedText(
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.characters, other.characters + ends[0]]),
            np.concatenate([self.bytes, other.bytes + ends[1]]),
        )


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A full row, the number of its first document, and the text that its loss is about."""

    row: TokenRow
    example: int
    characters: int
    bytes: int


class Packer:
    """Fills rows of `length` tokens with documents."""

    def __init__(self, length: int, *, causal: bool = True, alone: bool = False) -> None:
        """`length` at least 2: a token, and one to predict from it.

        `causal`: the first token of a piece is not predicted, and repeated where it goes on;
        `alone`: a row holds a piece of one document, however short.
        """
        if length < 2:
            raise ValueError(f"rows of {length} tokens have nothing to predict")
        self._length, self._causal, self._alone = length, causal, alone
        self._least = 2 if causal else 1  # tokens of a piece
        self._begin()

    def _begin(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._starts: list[int] = []
        self._filled = self._characters = self._bytes = 0
        self._example = -1

    def add(self, document: EncodedText, example: int) -> Iterator[PackedRow]:
        """Put a document in; the rows that became full. If `causal`, one of a single token is
        left out.
        """
        if self._alone:
            yield from self.close()
        place = 0
        while len(document) - place >= self._least:
            if self._length - self._filled < self._least:
                yield from self.close()
            end = min(place + self._length - self._filled, len(document))
            self._put(document, place, end, example)
            # The last token is context for what follows, unless nothing does.
            place = end - 1 if self._causal and end < len(document) else end

    def _put(self, document: EncodedText, place: int, end: int, example: int) -> None:
        if not self._pieces:
            self._example = example
        self._starts.append(self._filled)
        self._pieces.append(document.tokens[place:end])
        self._filled += end - place
        before = place if self._causal else place - 1  # the last token that is not predicted
        self._characters += _between(document.characters, before, end)
        self._bytes += _between(document.bytes, before, end)

    def close(self) -> Iterator[PackedRow]:
        """The row that is being filled, if there is one."""
        if self._pieces:
            row = TokenRow(
                np.zeros(0, np.int32),
                np.concatenate(self._pieces).astype(np.int32),
                np.array(self._starts, np.int32),
            )
            yield PackedRow(row, self._example, self._characters, self._bytes)
        self._begin()


def _between(ends: np.ndarray, before: int, end: int) -> int:
    """What tokens behind `before` (-1: from the first on) and before `end` cover."""
    return int(ends[end - 1]) - (int(ends[before]) if before >= 0 else 0)

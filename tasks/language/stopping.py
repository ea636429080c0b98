"""When the model stops before its room is used up, and who hears its tokens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class StopStrings(StoppingCriteria):
    """Ends a row whose text holds a stop string.

    The text's end alone is decoded: a stop string of n bytes that has just been completed lies
    within the last n tokens, as a token that adds to the text adds a byte at least. One more stands
    before them, as some tokenizers swallow a space at the beginning of what they decode. A run of
    byte tokens is not cut: without its beginning all of it would be U+FFFD.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        """`start` is the place of a row's first new token."""
        self._tokenizer, self._stop, self._start = tokenizer, tuple(stop), start
        self._window = max(len(each.encode()) for each in stop) + 1
        known = tokenizer.backend_tokenizer.token_to_id
        self._bytes = {known(f"<0x{byte:02X}>") for byte in range(256)} - {None}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) bool: rows that are done; `input_ids` are (B, T)."""
        first = max(self._start, input_ids.shape[1] - self._window)
        while first > self._start and not self._bytes.isdisjoint(input_ids[:, first].tolist()):
            first -= 1
        texts = self._tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        done = [any(each in text for each in self._stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class Ended(StoppingCriteria):
    """Ends all rows once somebody has called the work off."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) bool, all rows alike."""
        return torch.full((len(input_ids),), self._ended(), device=input_ids.device)


class Listener(BaseStreamer):
    """Hands each new token of a single prompt to a function."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """The prompt at first, then one token at a time."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self._on_token(token)

    def end(self) -> None:
        """The model has stopped."""


def criteria(
    tokenizer: Any, stop: Sequence[str], start: int, ended: Callable[[], bool] | None
) -> StoppingCriteriaList:
    """The criteria of one batch."""
    made = StoppingCriteriaList()
    if stop:
        made.append(StopStrings(tokenizer, stop, start))
    if ended is not None:
        made.append(Ended(ended))
    return made

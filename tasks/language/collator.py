"""How rows of tokens become batches of one model: what its family, tokenizer and config decide."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.speech_rows import SpeechRow
from goldcrest.tasks.data.tokens import TokenRow
from goldcrest.tasks.language.batches import (
    Batch,
    causal_batch,
    masked_batch,
    seq2seq_batch,
    speech_batch,
)
from goldcrest.tasks.language.rows import window_frames

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Rows to batches. Cheap to send to another process."""

    family: str
    pad: int
    """Id of the padding token."""
    mask: int | None = None
    """Masked models: id of the token that hides others."""
    special: tuple[int, ...] = ()
    """Ids that a masked model is never asked for."""
    first: int | None = 0
    """The position of a document's first token; None: the model takes no positions."""
    frames: int = 0
    """Speech models: frames of the window."""
    start: int = 0
    """Encoder-decoders: id of the token that the decoder starts with."""

    def __call__(
        self,
        rows: Sequence[TokenRow],
        rng: np.random.Generator,
        *,
        share: float = 0.15,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """The rows as a batch of the family, with labels (see batches.py).

        Args:
            rows: B rows; of a speech model, with features.
            rng: what is hidden from a masked model.
            share: of the tokens that a masked model is asked for.
            dtype: of masks that are numbers; that of the model's weights.
        """
        if self.family == "speech":
            heard = cast(Sequence[SpeechRow], rows)
            return speech_batch(heard, self.frames, self.pad, self.start)
        if self.family == "seq2seq":
            return seq2seq_batch(rows, self.pad, self.start)
        if self.family == "causal":
            return causal_batch(rows, self.pad, first=self.first, dtype=dtype)
        assert self.mask is not None
        hiding = {"share": share, "special": self.special, "first": self.first, "dtype": dtype}
        return masked_batch(rows, self.pad, self.mask, rng, **hiding)  # type: ignore[arg-type]


def make_collator(family: str, tokenizer: Any, config: PreTrainedConfig) -> Collator:
    """The collator of a model; InputError for a tokenizer or config that lacks what it needs."""
    from goldcrest.kernels.language.architectures import first_position, model_class

    if family == "masked" and tokenizer.mask_token_id is None:
        raise InputError(
            "a masked model needs a tokenizer with a mask token",
            hint='set tokenizer.mask to "<mask>"',
        )
    try:
        takes = inspect.signature(model_class(config, family).forward).parameters
    except ValueError as error:
        raise InputError(str(error)) from error
    return Collator(
        family=family,
        pad=tokenizer.pad_token_id or 0,
        mask=tokenizer.mask_token_id,
        special=tuple(tokenizer.all_special_ids),
        first=first_position(config) if "position_ids" in takes else None,
        frames=window_frames(config) if family == "speech" else 0,
        start=decoder_begin(config) if family in ("seq2seq", "speech") else 0,
    )


def decoder_begin(config: PreTrainedConfig) -> int:
    """Id of the token that a decoder starts with; InputError where the config names none."""
    from goldcrest.kernels.language.architectures import decoder_start

    try:
        return decoder_start(config)
    except ValueError as error:
        raise InputError(
            f"{error}, so its decoder has nothing to start with",
            hint="name decoder_start_token_id in the model's config.json",
        ) from error

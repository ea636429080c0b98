"""Batches of token rows for transformers: padding, labels, and documents that don't see each other.

Labels are -100 where there is no loss (transformers' convention); models shift them by one
themselves. Rows are padded on the right.

Documents of a packed row must not attend to each other, or a text would be learned as the sequel of
a stranger (M. Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021). Such a
batch has an additive mask (B, 1, T, T), 0 where a query may look and the dtype's lowest number
elsewhere, which transformers hand to attention as it is, and positions that restart with every
document. Models with relative positions (MPT's ALiBi) need the mask alone. Not every architecture
obeys it: `documents.py` asks the model.

Rows of one document need no such mask: the batch has the usual one, (B, T).

A decoder that reads an encoder's output is fed its labels moved right by one, behind the token that
it starts with. They are part of the batch: left to itself, the library shifts the labels of some
architectures (mBART, PLBart) in a way of their own, which generation does not follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from goldcrest.kernels.frontend.whisper_mel import window
from goldcrest.kernels.language.losses import decoder_inputs
from goldcrest.tasks.data.speech_rows import SpeechRow
from goldcrest.tasks.data.tokens import TokenRow

NO_LOSS = -100
Batch = dict[str, Tensor]


def causal_batch(
    rows: Sequence[TokenRow], pad: int, *, first: int | None = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Rows for a decoder: the loss is on answers, and on packed documents but their first tokens.

    Args:
        rows: B rows, packed or not.
        pad: id of the padding token.
        first: the position of a document's first token; None: the model takes no positions.
        dtype: of the 4D mask; that of the model's weights.

    Returns:
        input_ids, labels (B, T) int64; attention_mask (B, T) int64, or (B, 1, T, T) of `dtype`
        where a row holds several documents, then with position_ids (B, T) int64 unless `first` is
        None.
    """
    made = text_batch(rows, pad, causal=True, first=first, dtype=dtype)
    return {**made, "labels": _filled(rows, _causal_labels, NO_LOSS)}


def seq2seq_batch(rows: Sequence[TokenRow], pad: int, start: int) -> Batch:
    """Rows for an encoder-decoder whose decoder starts with the token `start`.

    Returns:
        input_ids, attention_mask (B, S); decoder_input_ids, labels (B, T); all int64.
    """
    mask = _filled(rows, lambda row: np.ones(len(row.prompt)), 0)
    return {
        "input_ids": _filled(rows, lambda row: row.prompt, pad),
        "attention_mask": mask,
        **_decoder(rows, pad, start),
    }


def speech_batch(rows: Sequence[SpeechRow], frames: int, pad: int, start: int) -> Batch:
    """Rows for a speech model whose decoder starts with the token `start`.

    Args:
        rows: B rows.
        frames: of the model's window, which is filled up with silence.
        pad, start: ids of tokens.

    Returns:
        input_features (B, M, `frames`) float32; decoder_input_ids, labels (B, T) int64.
    """
    heard = [window(torch.from_numpy(row.features), frames) for row in rows]
    return {"input_features": torch.stack(heard), **_decoder(rows, pad, start)}


def _decoder(rows: Sequence[TokenRow], pad: int, start: int) -> Batch:
    labels = _filled(rows, lambda row: row.answer, NO_LOSS)
    return {"decoder_input_ids": decoder_inputs(labels, start=start, pad=pad), "labels": labels}


def masked_batch(
    rows: Sequence[TokenRow],
    pad: int,
    mask_id: int,
    rng: np.random.Generator,
    *,
    share: float = 0.15,
    special: Collection[int] = (),
    first: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Rows for a masked model (J. Devlin et al., "BERT", 2019, section 3.1).

    `share` of the tokens that are not `special` are to be predicted: 80 % of them are hidden by
    `mask_id`, 10 % replaced by another token of the batch, 10 % stay. (BERT draws replacements from
    the whole vocabulary; tokens of the batch are as often there as in text.) At least one token is
    predicted. Same keys as `causal_batch`; attention is within documents, in both directions.
    """
    made = text_batch(rows, pad, causal=False, first=first, dtype=dtype)
    ids = made["input_ids"].numpy()
    real = _filled(rows, lambda row: np.ones(len(row)), 0).numpy().astype(bool)
    usable = real & ~np.isin(ids, list(special))
    chosen = usable & (rng.random(ids.shape) < share)
    if not chosen.any() and usable.any():
        places = np.argwhere(usable)
        chosen[tuple(places[rng.integers(len(places))])] = True
    labels = np.where(chosen, ids, NO_LOSS)
    fate = rng.random(ids.shape)
    others = rng.choice(ids[usable], size=ids.shape) if usable.any() else ids
    hidden = np.where(chosen & (fate < 0.8), mask_id, ids)
    hidden = np.where(chosen & (fate >= 0.9), others, hidden)
    made["input_ids"], made["labels"] = torch.from_numpy(hidden), torch.from_numpy(labels)
    return made


def text_batch(
    rows: Sequence[TokenRow],
    pad: int,
    *,
    causal: bool,
    first: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Rows as a single stack of blocks reads them, without labels; see `causal_batch`.

    A token looks at those of its document: before it if `causal`, else in both directions.
    """
    made = {
        "input_ids": _filled(rows, lambda row: np.concatenate([row.prompt, row.answer]), pad),
        "attention_mask": _filled(rows, lambda row: np.ones(len(row)), 0),
    }
    if all(len(row.starts) < 2 for row in rows):
        return made
    made["attention_mask"] = _documents_mask(rows, dtype, causal=causal)
    if first is not None:
        made["position_ids"] = _filled(rows, lambda row: first + _positions(row), 0)
    return made


def _filled(
    rows: Sequence[TokenRow], values: Callable[[TokenRow], np.ndarray], fill: int
) -> Tensor:
    """(B, T) int64 from a sequence of each row, filled up on the right."""
    found = [values(row) for row in rows]
    filled = np.full((len(rows), max(len(each) for each in found)), fill, np.int64)
    for row, each in zip(filled, found, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(filled)


def _causal_labels(row: TokenRow) -> np.ndarray:
    labels = np.concatenate([np.full(len(row.prompt), NO_LOSS), row.answer.astype(np.int64)])
    labels[len(row.prompt) + row.starts] = NO_LOSS  # nothing comes before a document
    return labels


def _documents_mask(rows: Sequence[TokenRow], dtype: torch.dtype, *, causal: bool) -> Tensor:
    """(B, 1, T, T): which pairs of tokens see each other."""
    numbers = _filled(rows, _document_numbers, -1)
    width = numbers.shape[1]
    seen = numbers[:, :, None] == numbers[:, None, :]
    if causal:
        seen &= torch.ones(width, width, dtype=torch.bool).tril()
    padding = numbers < 0
    # A softmax needs something to look at: padding looks at the first token, which it can't change.
    seen[padding] = False
    seen[:, :, 0] |= padding
    low = torch.finfo(dtype).min
    mask = torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), low, dtype=dtype))
    return mask[:, None]


def _document_numbers(row: TokenRow) -> np.ndarray:
    """Which document each token of a row is of; a prompt and answer are one."""
    numbers = np.zeros(len(row), np.int64)
    numbers[row.starts[1:]] = 1
    return np.cumsum(numbers)


def _positions(row: TokenRow) -> np.ndarray:
    """Places of tokens within their documents."""
    starts = row.starts if len(row.starts) else np.zeros(1, np.int32)
    sizes = np.diff(np.append(starts, len(row)))
    return np.arange(len(row)) - np.repeat(starts, sizes)

"""Batches of token rows for transformers: padding, labels, and documents that don't see each other.

Labels are -100 where there is no loss (transformers' convention); models shift them by one
themselves. Rows are padded on the right.

Documents of a packed row must not attend to each other, or a text would be learned as the sequel of
a stranger (M. Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021). Such a
batch has an additive mask (B, 1, T, T), 0 where a query may look and the dtype's lowest number
elsewhere, which transformers hand to attention as it is, and positions that restart with every
document. Models with relative positions (MPT's ALiBi) need the mask alone.

Rows of one document need no such mask: the batch has the usual one, (B, T).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from goldcrest.kernels.frontend.whisper_mel import window
from goldcrest.tasks.data.speech_rows import SpeechRow
from goldcrest.tasks.data.tokens import TokenRow

NO_LOSS = -100
Batch = dict[str, Tensor]


def causal_batch(
    rows: Sequence[TokenRow], pad: int, *, dtype: torch.dtype = torch.float32
) -> Batch:
    """Rows for a decoder: the loss is on answers, and on packed documents but their first tokens.

    Args:
        rows: B rows, packed or not.
        pad: id of the padding token.
        dtype: of the 4D mask; that of the model's weights.

    Returns:
        input_ids, labels (B, T) int64; attention_mask (B, T) int64, or (B, 1, T, T) of `dtype`
        where a row holds several documents, then with position_ids (B, T) int64.
    """
    made = _tokens(rows, pad)
    made["labels"] = _filled(rows, _causal_labels, NO_LOSS)
    return _with_documents(made, rows, dtype, causal=True)


def seq2seq_batch(rows: Sequence[TokenRow], pad: int) -> Batch:
    """Rows for an encoder-decoder: input_ids, attention_mask (B, S); labels (B, T), all int64."""
    mask = _filled(rows, lambda row: np.ones(len(row.prompt)), 0)
    return {
        "input_ids": _filled(rows, lambda row: row.prompt, pad),
        "attention_mask": mask,
        "labels": _filled(rows, lambda row: row.answer, NO_LOSS),
    }


def speech_batch(rows: Sequence[SpeechRow], frames: int) -> Batch:
    """Rows for a speech model.

    Args:
        rows: B rows.
        frames: of the model's window, which is filled up with silence.

    Returns:
        input_features (B, M, `frames`) float32; labels (B, T) int64.
    """
    heard = [window(torch.from_numpy(row.features), frames) for row in rows]
    return {
        "input_features": torch.stack(heard),
        "labels": _filled(rows, lambda row: row.answer, NO_LOSS),
    }


def masked_batch(
    rows: Sequence[TokenRow],
    pad: int,
    mask_id: int,
    rng: np.random.Generator,
    *,
    share: float = 0.15,
    special: Collection[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Rows for a masked model (J. Devlin et al., "BERT", 2019, section 3.1).

    `share` of the tokens that are not `special` are to be predicted: 80 % of them are hidden by
    `mask_id`, 10 % replaced by another token of the batch, 10 % stay. (BERT draws replacements from
    the whole vocabulary; tokens of the batch are as often there as in text.) At least one token is
    predicted. Same keys as `causal_batch`; attention is within documents, in both directions.
    """
    made = _tokens(rows, pad)
    ids = made["input_ids"].numpy()
    usable = made["attention_mask"].numpy().astype(bool) & ~np.isin(ids, list(special))
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
    return _with_documents(made, rows, dtype, causal=False)


def _tokens(rows: Sequence[TokenRow], pad: int) -> Batch:
    return {
        "input_ids": _filled(rows, lambda row: np.concatenate([row.prompt, row.answer]), pad),
        "attention_mask": _filled(rows, lambda row: np.ones(len(row)), 0),
    }


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


def _with_documents(
    made: Batch, rows: Sequence[TokenRow], dtype: torch.dtype, *, causal: bool
) -> Batch:
    """The batch with what keeps documents apart, if any row holds several."""
    if all(len(row.starts) < 2 for row in rows):
        return made
    width = made["input_ids"].shape[1]
    numbers = _filled(rows, _document_numbers, -1)

    seen = numbers[:, :, None] == numbers[:, None, :]
    if causal:
        seen &= torch.ones(width, width, dtype=torch.bool).tril()
    padding = numbers < 0
    # A softmax needs something to look at: padding looks at the first token, which it can't change.
    seen[padding] = False
    seen[:, :, 0] |= padding
    low = torch.finfo(dtype).min
    mask = torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), low, dtype=dtype))
    positions = _filled(rows, _positions, 0)
    return {**made, "attention_mask": mask[:, None], "position_ids": positions}


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

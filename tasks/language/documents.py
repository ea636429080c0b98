"""Whether a model reads rows as its family should, packed ones too: it is asked.

A causal model must not see what it predicts. Encoders that can be decoders (BERT and its kin) look
in both directions unless their config says `is_decoder`; trained on next tokens, they would copy.

An attention mask over documents (batches.py) is obeyed by most architectures of the library, not by
all. A recurrent one (Mamba, RWKV) carries its state over the border, a convolution or a Fourier
transform mixes across it, some make positions of the whole row, some can't read such a mask. So
before packed rows are used, the model reads two short documents in one row: what it makes of the
second must be what it makes of it alone.

Windows of attention that are longer than the question are beyond it. The library has no window
inside of a mask that is given, so rows may be no longer than the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.tokens import TokenReader, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

    from goldcrest.tasks.language.collator import Collator

SIZES = (5, 7)
"""Tokens of the two documents."""
TOLERANCE, ROUNDINGS = 1e-3, 32
"""Of the greatest logit: sums in another order are off by 1e-6, a neighbour's influence by more. Of
a precision that is coarser, that many of its steps."""


def check_reading(model: Any, collator: Collator, *readers: TokenReader) -> None:
    """InputError for a causal model that sees what is ahead, and where any row holds several
    documents and the model does not keep them apart.

    Args:
        model: with weights of floating point. It is left as it was.
        collator: of the model.
        readers: the rows that it is to read.
    """
    if collator.family == "causal":
        _check_causal(model, collator)
    packed = [each for each in readers if bool((each.documents > 1).any())]
    if packed:
        _check_packed(model, collator, packed)


def _check_causal(model: Any, collator: Collator) -> None:
    """Another last token must not change what is predicted before it."""
    from goldcrest.kernels.language.architectures import longest_text

    one = _drawn(model, collator)[: longest_text(model.config)]
    other = np.append(one[:-1], one[0])
    off = _off(model, collator, (_row(one), 0), (_row(other), 0), len(one) - 1)
    if off > _tolerance(model):
        decoder = getattr(model.config, "is_decoder", None) is False
        raise InputError(
            f"'{model.config.model_type}' sees tokens that it is to predict: what follows changes "
            f"its logits by {off:.1g} of the greatest",
            hint="set is_decoder to true in its settings or config.json"
            if decoder
            else "set family to masked",
        )


def _check_packed(model: Any, collator: Collator, packed: Sequence[TokenReader]) -> None:
    name = model.config.model_type
    longest = max(int(each.lengths.max()) for each in packed)
    window = attention_window(model.config)
    if window is not None and longest > window:
        raise InputError(
            f"packed rows have up to {longest} tokens, '{name}' attends to {window}: its window "
            "can't be kept in rows of several documents",
            hint=f"set pack to nothing, or length to {window}, where the tokens are made",
        )
    drawn = _drawn(model, collator)
    first = SIZES[0]
    try:
        off = _off(model, collator, (_row(drawn, first), first), (_row(drawn[first:]), 0), SIZES[1])
        why = f"logits off by {off:.1g} of the greatest"
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        off, why = math.inf, f"it fails: {' '.join(str(error).split())[:100]}"
    if off > _tolerance(model):
        raise InputError(
            f"'{name}' does not keep the documents of a packed row apart ({why})",
            hint="set pack to nothing where the tokens are made: one document in a row",
        )


def attention_window(config: Any) -> int | None:
    """Tokens that some layer attends to at most, or None; of ModernBERT, on either side."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


_Place = tuple[TokenRow, int]


def _off(model: Any, collator: Collator, one: _Place, other: _Place, tokens: int) -> float:
    """How far apart the logits of `tokens` tokens are, from a place of either row on: the greatest
    difference by the greatest logit. The model is in eval mode meanwhile.
    """
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            a, b = (
                _logits(model, collator, row)[:, start : start + tokens]
                for row, start in (one, other)
            )
    finally:
        model.train(training)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _tolerance(model: Any) -> float:
    import torch

    return max(TOLERANCE, ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)


def _drawn(model: Any, collator: Collator) -> np.ndarray:
    """Distinct tokens of two documents (where the vocabulary has as many), none of them special."""
    vocabulary = model.config.get_text_config().vocab_size
    usable = np.setdiff1d(np.arange(vocabulary), [collator.pad, *collator.special])
    rng = np.random.default_rng(0)
    return rng.choice(usable, sum(SIZES), replace=len(usable) < sum(SIZES)).astype(np.int32)


def _row(tokens: np.ndarray, *starts: int) -> TokenRow:
    """Documents that start at 0 and at `starts`."""
    return TokenRow(np.zeros(0, np.int32), tokens, np.array([0, *starts], np.int32))


def _logits(model: Any, collator: Collator, row: TokenRow) -> Tensor:
    """(1, T, V) float32."""
    from goldcrest.tasks.language.batches import text_batch
    from goldcrest.tasks.language.objective import model_inputs

    causal = collator.family == "causal"
    batch = text_batch([row], collator.pad, causal=causal, first=collator.first)
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in batch.items()}
    logits: Tensor = model(**model_inputs(model, moved)).logits
    return logits.float()

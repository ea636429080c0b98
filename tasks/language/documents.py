"""Whether a model keeps the documents of packed rows apart: it is asked.

An attention mask over documents (batches.py) is obeyed by most architectures of the library, not by
all. A recurrent one (Mamba, RWKV) carries its state over the border, a convolution or a Fourier
transform mixes across it, some make positions of the whole row, some can't read such a mask. So
before packed rows are used, the model reads two short documents in one row: what it makes of the
second must be what it makes of it alone.

Windows of attention that are longer than the question are beyond it. The library has no window
inside of a mask that is given, so rows may be no longer than the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.tokens import TokenReader, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

    from goldcrest.tasks.language.collator import Collator

SIZES = (5, 7)
"""Tokens of the two documents."""
TOLERANCE = 1e-3
"""Of the greatest logit: sums in another order are off by 1e-6, a neighbour's influence by more."""


def check_packing(model: Any, collator: Collator, *readers: TokenReader) -> None:
    """InputError where any row holds several documents and the model does not keep them apart.

    Args:
        model: with weights of floating point. It is left as it was.
        collator: of the model.
        readers: the rows that it is to read.
    """
    packed = [each for each in readers if bool((each.documents > 1).any())]
    if not packed:
        return
    name = model.config.model_type
    longest = max(int(each.lengths.max()) for each in packed)
    window = attention_window(model.config)
    if window is not None and longest > window:
        raise InputError(
            f"packed rows have up to {longest} tokens, '{name}' attends to {window}: its window "
            "can't be kept in rows of several documents",
            hint=f"set pack to nothing, or length to {window}, where the tokens are made",
        )
    off, why = _off(model, collator)
    if off > TOLERANCE:
        raise InputError(
            f"'{name}' does not keep the documents of a packed row apart ({why})",
            hint="set pack to nothing where the tokens are made: one document in a row",
        )


def attention_window(config: Any) -> int | None:
    """Tokens that some layer attends to at most, or None; of ModernBERT, on either side."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def _off(model: Any, collator: Collator) -> tuple[float, str]:
    """How far the second document's logits are from those of it alone, of the greatest of these."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, both = (_logits(model, collator, row) for row in _rows(model, collator))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return float("inf"), f"it fails: {' '.join(str(error).split())[:100]}"
    finally:
        model.train(training)
    off = float((both[:, SIZES[0] :] - one).abs().max() / one.abs().max().clamp(min=1e-30))
    return off, f"logits off by {off:.1g} of the greatest"


def _rows(model: Any, collator: Collator) -> tuple[TokenRow, TokenRow]:
    """The second document, and both in one row."""
    vocabulary = model.config.get_text_config().vocab_size
    usable = np.setdiff1d(np.arange(vocabulary), [collator.pad, *collator.special])
    drawn = np.random.default_rng(0).choice(usable, sum(SIZES)).astype(np.int32)
    nothing, starts = np.zeros(0, np.int32), np.array([0, SIZES[0]], np.int32)
    return (
        TokenRow(nothing, drawn[SIZES[0] :], starts[:1]),
        TokenRow(nothing, drawn, starts),
    )


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

"""Whether a model reads rows as its family should, packed ones too: it is asked.

A causal model must not see what it predicts. Encoders that can be decoders (BERT and its kin) look
in both directions unless their config says `is_decoder`; trained on next tokens, they would copy.

An attention mask over documents (batches.py) is obeyed by most architectures of the library, not by
all. A recurrent one (Mamba, RWKV) carries its state over the border, a convolution or a Fourier
transform mixes across it, some make positions of the whole row, some can't read such a mask. So
before packed rows are used, the model reads two short documents in one row. What it makes of the
second must not change with the first, and must be what it makes of it alone.

Windows of attention that are longer than the question are beyond it. The library has no window
inside of a mask that is given, so documents may be no longer than the window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.tokens import TokenReader, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

    from goldcrest.tasks.language.collator import Collator

SIZES = (5, 7, 5)
"""Tokens of the first document, of the second, and of another first one."""
EXACT = 1e-5
"""Of the greatest logit: what tokens that are not seen may change, in a batch of the same shape,
where nothing but the experts of a mixture is computed in another order."""
ALONE, ROUNDINGS = 1e-3, 32
"""Of the greatest logit: what another shape may change; of a coarse precision, that many steps."""


def check_reading(
    model: Any, collator: Collator, *readers: TokenReader, cut: int | None = None
) -> None:
    """InputError for a causal model that sees what is ahead, and where any row holds several
    documents and the model does not keep them apart.

    Nothing is said of a model whose logits are not finite.

    Args:
        model: with weights of floating point. It is left as it was.
        collator: of the model.
        readers: the rows that it is to read.
        cut: the length that rows are cut to, if they are.
    """
    with _questioned(model):
        if collator.family == "causal":
            _check_causal(model, collator)
        packed = [each for each in readers if bool((each.documents > 1).any())]
        if packed:
            longest = max(each.longest_document for each in readers)
            _check_window(model.config, longest if cut is None else min(longest, cut))
            _check_packed(model, collator)


@contextlib.contextmanager
def _questioned(model: Any) -> Iterator[None]:
    """In eval mode, without gradients, and afterwards as it was.

    BigBird attends in blocks of long rows only, and does not go back to it after a short one.
    """
    import torch

    training = model.training
    changing = [each for each in model.modules() if hasattr(each, "set_attention_type")]
    kinds = [each.attention_type for each in changing]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, kind in zip(changing, kinds, strict=True):
            module.set_attention_type(kind)
        model.train(training)


def _check_causal(model: Any, collator: Collator) -> None:
    """Another last token must not change what is predicted before it."""
    from goldcrest.kernels.language.architectures import longest_text

    _, second, another = _drawn(model, collator)
    one = second[: longest_text(model.config)]
    other = np.append(one[:-1], another[:1])
    a, b = (_logits(model, collator, _row(each))[:, :-1] for each in (one, other))
    if _finite(a) and (off := _off(a, b)) > EXACT:
        raise InputError(
            f"'{model.config.model_type}' sees tokens that it is to predict: what follows changes "
            f"its logits by {off:.1g} of the greatest",
            hint=_to_be_causal(model.config),
        )


def _to_be_causal(config: Any) -> str:
    from goldcrest.kernels.language.architectures import architecture_names

    for switch in ("is_decoder", "causal"):
        if getattr(config, switch, None) is False:
            return f"set {switch} to true in its settings or config.json"
    if config.model_type in architecture_names("masked"):
        return "set family to masked"
    return "take another architecture"


def _check_window(config: Any, longest: int) -> None:
    window = attention_window(config)
    if window is not None and longest > window:
        raise InputError(
            f"a document of a packed row has {longest} tokens, '{config.model_type}' attends to "
            f"{window}: its window can't be kept in rows of several documents",
            hint=f"set pack to nothing, or length to {window}, where the tokens are made",
        )


def _check_packed(model: Any, collator: Collator) -> None:
    """The second of two documents, behind one, behind another and alone."""
    import torch

    from goldcrest.kernels.language.architectures import MISFITS

    if _setting(model.config, "attention_type") == "block_sparse":
        raise _together(model, "the blocks that it attends to are chosen for the row")
    first, second, another = _drawn(model, collator)
    alone = _logits(model, collator, _row(second))
    if not _finite(alone):
        return
    try:
        behind, other = (
            _logits(model, collator, _row(np.concatenate([each, second]), len(each)))[
                :, len(each) :
            ]
            for each in (first, another)
        )
    except torch.OutOfMemoryError:
        raise
    except MISFITS as error:
        raise _together(
            model, f"it can't read them: {' '.join(str(error).split())[:100]}"
        ) from error
    # Not "more than": NaN is more than nothing.
    if not _off(behind, other) <= EXACT:
        raise _together(model, "the one before changes its logits")
    steps = ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps
    if not _off(behind, alone) <= max(ALONE, steps):
        raise _together(model, "alone it has other logits: its positions, say, go on")


def _together(model: Any, why: str) -> InputError:
    return InputError(
        f"'{model.config.model_type}' does not keep the documents of a packed row apart ({why})",
        hint="set pack to nothing where the tokens are made: one document in a row",
    )


def attention_window(config: Any) -> int | None:
    """Tokens that some layer attends to at most, or None; of ModernBERT, on either side."""
    text = config.get_text_config()
    kinds = _setting(text, "layer_types")
    windows = {"sliding_window": "sliding", "attention_chunk_size": "chunked"}
    sizes = [
        _setting(text, name)
        for name, word in windows.items()
        if kinds is None or any(word in str(kind) for kind in kinds)
    ]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _setting(config: Any, name: str) -> Any:
    """A field of a config; None where it has none, or another for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # as the library says of the latter
        return None


def _off(one: Tensor, other: Tensor) -> float:
    """The greatest difference by the greatest of `other`."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _finite(logits: Tensor) -> bool:
    return bool(logits.isfinite().all())


def _drawn(model: Any, collator: Collator) -> list[np.ndarray]:
    """Documents of `SIZES` tokens: of all different ones, if there are as many, none special."""
    vocabulary = model.config.get_text_config().vocab_size
    usable = np.setdiff1d(np.arange(vocabulary), [collator.pad, *collator.special])
    total = sum(SIZES)
    drawn = np.random.default_rng(0).choice(usable, total, replace=len(usable) < total)
    return np.split(drawn.astype(np.int32), np.cumsum(SIZES)[:-1])


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

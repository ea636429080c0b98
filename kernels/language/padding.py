"""Which tokens of a batch are real: what calibration must count, and what it must not.

B sequences   T tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

IGNORED = -100
"""The label of a token without a loss."""


def token_mask(batch: Mapping[str, Any], *, decoder: bool = False) -> Tensor | None:
    """The real tokens (B, T) bool of a batch of keyword arguments; None: all are.

    Of an encoder-decoder's decoder (`decoder=True`) those are `decoder_attention_mask`, or the
    positions with a label. A mask of pairs (B, 1, T, T), true or 0 where a token may look, tells by
    its diagonal: a real token may look at itself.
    """
    if decoder:
        mask = batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        return _plain(mask) if mask is not None or labels is None else labels != IGNORED
    if "input_features" in batch:  # speech of a fixed length, silence and all
        return None
    return _plain(batch.get("attention_mask"))


def is_decoder(model: nn.Module, stack: int) -> bool:
    """Whether a model's stack number `stack` decodes what an encoder before it read."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and stack > 0


def _plain(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask != 0
    diagonal = mask.diagonal(dim1=-2, dim2=-1).reshape(mask.shape[0], -1, mask.shape[-1])[:, 0]
    return diagonal == 0 if diagonal.is_floating_point() else diagonal != 0

"""Log-sum-exp of similarities to all other rows, streamed: what SupCon and InfoNCE share.

    lse_i = log sum_{k != own(i)} exp(a_i . k_k / tau)

The A x K similarities are made in blocks of columns with a running maximum and made again for the
gradient, so that memory grows with A, not with A * K.

A anchors, K keys, C features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from goldcrest.kernels.clustering.terms.divergence import full_precision


def unit_logits(logits: Tensor) -> Tensor:
    """Rows (B, C) at unit length in at least float32; a row of zeros stays zero."""
    return normalize(full_precision(logits), dim=1, eps=1e-8)


class _LogSumExpOthers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor, own: Tensor, temperature: float, block: int
    ) -> Tensor:
        peak = anchors.new_full((len(anchors),), -torch.inf)
        total = anchors.new_zeros(len(anchors))
        for start in range(0, len(keys), block):
            scores = _scores(anchors, keys, own, temperature, start, block)
            higher = torch.maximum(peak, scores.max(dim=1).values)
            safe = higher.masked_fill(higher.isneginf(), 0.0)  # only its own key so far
            total = total * (peak - safe).exp() + (scores - safe[:, None]).exp().sum(dim=1)
            peak = higher
        value = peak + total.log()
        ctx.save_for_backward(anchors, keys, own, value)
        ctx.temperature, ctx.block = temperature, block
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        anchors, keys, own, value = ctx.saved_tensors
        to_anchors, to_keys = torch.zeros_like(anchors), torch.zeros_like(keys)
        scale = (gradient / ctx.temperature)[:, None]
        for start in range(0, len(keys), ctx.block):
            scores = _scores(anchors, keys, own, ctx.temperature, start, ctx.block)
            weights = scale * (scores - value[:, None]).exp()
            to_anchors += weights @ keys[start : start + ctx.block]
            to_keys[start : start + ctx.block] = weights.T @ anchors
        return to_anchors, to_keys, None, None, None


def _scores(
    anchors: Tensor, keys: Tensor, own: Tensor, temperature: float, start: int, block: int
) -> Tensor:
    part = keys[start : start + block]
    scores = anchors @ part.T / temperature
    inside = ((own >= start) & (own < start + len(part))).nonzero()[:, 0]
    scores[inside, own[inside] - start] = -torch.inf
    return scores


def log_sum_exp_others(
    anchors: Tensor, keys: Tensor, own: Tensor, *, temperature: float, block: int = 4096
) -> Tensor:
    """lse (A,) of anchors (A, C) against keys (K, C), K >= 2, less key own_i of each anchor.

    `own` (A,) int64 is the place of the anchor itself among the keys; `block` columns at a time
    (the result does not depend on it).
    """
    return _LogSumExpOthers.apply(anchors, keys, own, temperature, block)


def log_sum_exp_others_reference(
    anchors: Tensor, keys: Tensor, own: Tensor, *, temperature: float
) -> Tensor:
    """The plain twin of `log_sum_exp_others`: the whole similarity matrix at once."""
    scores = anchors @ keys.T / temperature
    hidden = torch.arange(len(keys), device=keys.device) == own[:, None]
    return scores.masked_fill(hidden, -torch.inf).logsumexp(dim=1)

"""Virtual mixup on logits: predictions should be linear between samples.

Source: Mao et al. 2019 (virtual mixup training, "VMT"); Fathan & Alam 2025, equation 10.5 (which
prints probabilities; its text says logits, which work much better):

    xt_i = a_i x_i + (1 - a_i) x_r(i)          lt_i = a_i f(x_i) + (1 - a_i) f(x_r(i))
    L    = mean_i KL(sg[softmax(lt_i)] || softmax(f(xt_i)))

B batch, D input dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from goldcrest.kernels.clustering.terms.divergence import kl_divergence, log_probabilities

MixSpace = Literal["logits", "probabilities"]


def mix(rows: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """a_i rows_i + (1 - a_i) rows_r(i): rows (B, D), partner r (B,) int64, share a (B,)."""
    return share[:, None] * rows + (1 - share[:, None]) * rows[partner]


def mixed_target(
    logits: Tensor, partner: Tensor, share: Tensor, *, space: MixSpace = "logits"
) -> Tensor:
    """Logits (B, C) of mixed predictions, mixed as logits or (the ablation) as probabilities."""
    if space == "logits":
        return mix(logits, partner, share)
    # In logarithms: a probability that underflows to 0 would make the target's logarithm infinite.
    logs, a = log_probabilities(logits), share[:, None]
    return torch.logaddexp(a.log() + logs, (-a).log1p() + logs[partner])


def mixup_loss(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    logits: Tensor,
    partner: Tensor,
    share: Tensor,
    *,
    space: MixSpace = "logits",
    fixed_target: bool = True,
    renormalise: bool = False,
) -> Tensor:
    """Equation 10.5 for x (B, D) with logits (B, C), partners (B,) and shares (B,) in [0, 1].

    `fixed_target` stops the gradient through the mixed predictions, as VMT does;
    `renormalise` brings mixed inputs back to unit length (not in the equation).
    """
    target = mixed_target(logits, partner, share, space=space)
    mixed = mix(x, partner, share)
    predicted = predict(normalize(mixed, dim=1) if renormalise else mixed)
    return kl_divergence(target.detach() if fixed_target else target, predicted)

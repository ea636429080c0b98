"""OC-softmax for many classes: each speaker against the rest, with a margin on either side.

Source: Y. Zhang, F. Jiang, Z. Duan, "One-Class Learning Towards Synthetic Voice Spoofing
Detection", IEEE Signal Processing Letters 2021, equation (5), for two classes and one centre w:

    target      softplus(alpha (m0 - cos))        otherwise   softplus(alpha (cos - m1))

The speaker study applies it to thousands of speakers without giving a formula. Here every speaker
has a centre of its own and all others are the rest:

    L = softplus(alpha (m0 - cos_y)) + log(1 + sum_{j != y} exp(alpha (cos_j - m1)))      "joint"

With one centre and a binary label that is the original. `negatives="sum"` or `"mean"` takes the
sum or the mean over j of softplus(alpha (cos_j - m1)) in place of the second term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.margin._cosine import class_weights, cosines, target_cosine


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of OC-softmax."""

    scale: float = 20.0  # alpha
    target_margin: float = 0.9  # m0, cosine that the own centre should exceed
    other_margin: float = 0.2  # m1, cosine that other centres should stay below; 0.5 in the code
    negatives: Literal["joint", "sum", "mean"] = "joint"  # how the other classes are put together

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale}")
        if not -1 <= self.other_margin < self.target_margin <= 1:
            raise ValueError(
                "margins must satisfy -1 <= other_margin < target_margin <= 1, not "
                f"{self.other_margin} and {self.target_margin}"
            )
        if self.negatives not in ("joint", "sum", "mean"):
            raise ValueError(f"negatives must be joint, sum or mean, not '{self.negatives}'")


def binary_loss(cosine: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """The original: mean loss of cosines (B,) to the one centre, `target` (B,) bool."""
    towards = settings.target_margin - cosine
    away = cosine - settings.other_margin
    return F.softplus(settings.scale * towards.where(target, away)).mean()


def loss(cosine: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Mean loss of cosines (B, N) with labels (B,)."""
    own = settings.scale * (settings.target_margin - target_cosine(cosine, labels))
    others = settings.scale * (cosine - settings.other_margin)
    is_own = F.one_hot(labels, cosine.shape[1]).bool()
    if settings.negatives == "joint":
        others = others.masked_fill(is_own, float("-inf"))
        pushed = F.softplus(torch.logsumexp(others, dim=1))
    else:
        pushed = F.softplus(others).masked_fill(is_own, 0.0).sum(dim=1)
        if settings.negatives == "mean":
            pushed = pushed / (cosine.shape[1] - 1)
    return (F.softplus(own) + pushed).mean()


class Head(nn.Module):
    """One centre per class on the sphere."""

    def __init__(self, embedding_dim: int, classes: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = class_weights(classes, embedding_dim)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) and labels (B,) int64 -> mean loss; no labels -> `logits`."""
        if labels is None:
            return self.logits(embeddings)
        return loss(cosines(embeddings, self.weight), labels, self.settings)

    def logits(self, embeddings: Tensor) -> Tensor:
        """alpha cos_j: (B, E) -> (B, N)."""
        return self.settings.scale * cosines(embeddings, self.weight)

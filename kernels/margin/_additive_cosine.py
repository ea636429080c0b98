"""Additive margin on the cosine: the one loss behind the presets `am` and `cosface`.

Sources: F. Wang, J. Cheng, W. Liu, H. Liu, "Additive Margin Softmax for Face Verification", IEEE
Signal Processing Letters 2018, equation (6); H. Wang et al., "CosFace: Large Margin Cosine Loss for
Deep Face Recognition", CVPR 2018, equation (4). The two papers print the same formula:

    logit_y = s (cos_y - m)      logit_j = s cos_j      loss = softmax cross-entropy
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.margin._cosine import (
    class_weights,
    cosines,
    replace_target,
    target_cosine,
)


class AdditiveSettings(Protocol):
    """What both presets' settings hold."""

    @property
    def scale(self) -> float:
        """s, inverse temperature of the softmax."""
        ...

    @property
    def margin(self) -> float:
        """m, subtracted from the target's cosine."""
        ...


def check(settings: AdditiveSettings) -> None:
    """Raise ValueError for a scale or a margin that cannot be."""
    if settings.scale <= 0:
        raise ValueError(f"scale must be above 0, not {settings.scale}")
    if not 0 <= settings.margin < 2:
        raise ValueError(f"margin must be in [0, 2), a difference of cosines: {settings.margin}")


def loss(cosine: Tensor, labels: Tensor, settings: AdditiveSettings) -> Tensor:
    """Mean loss of cosines (B, N) with labels (B,)."""
    target = target_cosine(cosine, labels) - settings.margin
    return F.cross_entropy(settings.scale * replace_target(cosine, target, labels), labels)


class AdditiveHead(nn.Module):
    """A linear classifier without bias on the sphere, trained with an additive cosine margin."""

    def __init__(self, embedding_dim: int, classes: int, settings: AdditiveSettings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = class_weights(classes, embedding_dim)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) and labels (B,) int64 -> mean loss; no labels -> `logits`."""
        if labels is None:
            return self.logits(embeddings)
        return loss(cosines(embeddings, self.weight), labels, self.settings)

    def logits(self, embeddings: Tensor) -> Tensor:
        """s cos_j without the margin: (B, E) -> (B, N)."""
        return self.settings.scale * cosines(embeddings, self.weight)

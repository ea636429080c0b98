"""AAM-softmax (ArcFace): an additive angular margin on the target class.

Source: J. Deng, J. Guo, N. Xue, S. Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face
Recognition", CVPR 2019, equation (3). Defaults: scale 30 and margin 0.1, the speaker study's.

    logit_y = s cos(theta_y + m)      logit_j = s cos(theta_j)      loss = softmax cross-entropy
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.margin._cosine import (
    class_weights,
    cosines,
    replace_target,
    target_cosine,
)

CLAMP = 1e-7
"""|cos| stays below 1 by this much, where the sine's gradient is infinite."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of AAM-softmax."""

    scale: float = 30.0  # s, inverse temperature of the softmax
    margin: float = 0.1  # m, radians

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale}")
        if not 0 <= self.margin < math.pi / 2:
            raise ValueError(f"margin must be in [0, pi/2) radians, not {self.margin}")


def target_logit(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + m) from cos(theta), continued beyond theta = pi - m so that it keeps falling.

    There cos(theta + m) would rise again; the straight continuation is cos(theta) - m sin(pi - m).
    """
    cosine = cosine.clamp(-1 + CLAMP, 1 - CLAMP)
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    continued = cosine - margin * math.sin(math.pi - margin)
    return shifted.where(cosine > math.cos(math.pi - margin), continued)


def loss(cosine: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Mean loss of cosines (B, N) with labels (B,)."""
    target = target_logit(target_cosine(cosine, labels), settings.margin)
    return F.cross_entropy(settings.scale * replace_target(cosine, target, labels), labels)


class Head(nn.Module):
    """A linear classifier without bias on the sphere, trained with an additive angular margin."""

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
        """s cos_j without the margin: (B, E) -> (B, N)."""
        return self.settings.scale * cosines(embeddings, self.weight)

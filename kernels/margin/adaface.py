"""AdaFace: a margin that adapts to the quality of the example, read off the embedding's norm.

Source: M. Kim, A. K. Jain, X. Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR
2022, equations (14)-(18).

    z = clip(h (||x|| - mu) / (sigma + eps), -1, 1)
    logit_y = s [cos(theta_y - m z) - (m + m z)]      logit_j = s cos_j

mu and sigma are running averages of the norms' mean and deviation. z = -1 (poor examples) is
ArcFace's angular margin, z = 0 CosFace's additive one, z = 1 stresses good examples.
The norm must be the network's own: after a final BatchNorm norms hardly differ, and so does z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.margin._cosine import (
    class_weights,
    cosines,
    replace_target,
    target_cosine,
)

EPS = 1e-3
"""Added to sigma, and the distance of cosines from +-1 and of angles from 0 and pi."""

NORM_RANGE = (1e-3, 100.0)
"""Norms are clipped to this range before they enter the averages."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of AdaFace, section 4.1 of the paper."""

    scale: float = 64.0  # s, inverse temperature of the softmax
    margin: float = 0.4  # m, radians and cosine
    concentration: float = 0.333  # h: two thirds of the norms fall within (-1, 1) before clipping
    momentum: float = 0.01  # weight of a new batch in the running averages; 1 is "batch only"

    def __post_init__(self) -> None:
        if self.scale <= 0 or self.concentration <= 0:
            raise ValueError("scale and concentration must be above 0")
        if not 0 <= self.margin < math.pi / 2:
            raise ValueError(f"margin must be in [0, pi/2), not {self.margin}")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], not {self.momentum}")


def quality(norms: Tensor, mean: Tensor, deviation: Tensor, concentration: float) -> Tensor:
    """z in [-1, 1] (B,) of norms (B,) under the running mean and deviation, equation (14)."""
    return (concentration * (norms - mean) / (deviation + EPS)).clamp(-1, 1)


def target_cosine_with_margin(cosine: Tensor, z: Tensor, margin: float) -> Tensor:
    """cos(theta - m z) - (m + m z) for cosines and qualities (B,), equations (15) and (16)."""
    theta = cosine.clamp(-1 + EPS, 1 - EPS).acos()
    angular = (theta - margin * z).clamp(EPS, math.pi - EPS)
    return angular.cos() - (margin + margin * z)


def loss(cosine: Tensor, labels: Tensor, z: Tensor, settings: Settings) -> Tensor:
    """Mean loss of cosines (B, N) with labels (B,) and qualities (B,)."""
    cosine = cosine.clamp(-1 + EPS, 1 - EPS)
    target = target_cosine_with_margin(target_cosine(cosine, labels), z, settings.margin)
    return F.cross_entropy(settings.scale * replace_target(cosine, target, labels), labels)


class Head(nn.Module):
    """A linear classifier without bias on the sphere, trained with the adaptive margin.

    The running mean and deviation of the norms are buffers (start 20 and 100): they are part of
    the state and are updated by `forward` in training mode.
    """

    norm_mean: Tensor
    norm_deviation: Tensor

    def __init__(self, embedding_dim: int, classes: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = class_weights(classes, embedding_dim)
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_deviation", torch.tensor(100.0))

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Unnormalised embeddings (B, E), labels (B,) int64 -> mean loss; no labels -> `logits`."""
        if labels is None:
            return self.logits(embeddings)
        norms = embeddings.detach().float().norm(dim=1).clamp(*NORM_RANGE)
        if self.training:
            self._follow(norms)
        z = quality(norms, self.norm_mean, self.norm_deviation, self.settings.concentration)
        return loss(cosines(embeddings, self.weight), labels, z, self.settings)

    @torch.no_grad()
    def _follow(self, norms: Tensor) -> None:
        """Move the running averages towards the batch; one example alone has no deviation."""
        share = self.settings.momentum
        self.norm_mean.lerp_(norms.mean().to(self.norm_mean.dtype), share)
        if len(norms) > 1:
            self.norm_deviation.lerp_(norms.std().to(self.norm_deviation.dtype), share)

    def logits(self, embeddings: Tensor) -> Tensor:
        """s cos_j without the margin: (B, E) -> (B, N)."""
        return self.settings.scale * cosines(embeddings, self.weight)

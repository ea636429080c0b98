"""AM-softmax: an additive margin on the target's cosine, with the speaker field's scale.

Source: F. Wang, J. Cheng, W. Liu, H. Liu, "Additive Margin Softmax for Face Verification", IEEE
Signal Processing Letters 2018, equation (6). The same formula as CosFace, see `_additive_cosine`.
"""

from __future__ import annotations

from dataclasses import dataclass

from goldcrest.kernels.margin._additive_cosine import AdditiveHead, check, loss

__all__ = ["Head", "Settings", "loss"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of AM-softmax; the speaker study gives none, these are usual for speakers."""

    scale: float = 30.0  # s, inverse temperature of the softmax
    margin: float = 0.2  # m, difference of cosines

    def __post_init__(self) -> None:
        check(self)


class Head(AdditiveHead):
    """AM-softmax head."""

    def __init__(self, embedding_dim: int, classes: int, settings: Settings) -> None:
        super().__init__(embedding_dim, classes, settings)

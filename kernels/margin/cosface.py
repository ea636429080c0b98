"""CosFace: an additive margin on the target's cosine, with the face field's scale.

Source: H. Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018,
equation (4). The same formula as AM-softmax, see `_additive_cosine`.
"""

from __future__ import annotations

from dataclasses import dataclass

from goldcrest.kernels.margin._additive_cosine import AdditiveHead, check, loss

__all__ = ["Head", "Settings", "loss"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of CosFace, those of the AdaFace comparison; the paper itself uses m = 0.35."""

    scale: float = 64.0  # s, inverse temperature of the softmax
    margin: float = 0.4  # m, difference of cosines

    def __post_init__(self) -> None:
        check(self)


class Head(AdditiveHead):
    """CosFace head."""

    def __init__(self, embedding_dim: int, classes: int, settings: Settings) -> None:
        super().__init__(embedding_dim, classes, settings)

"""SquareHead: feature distillation in which every block counts alike.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language
Models", arXiv 2310.06927, section 3:

    L_feat^l = MSE(f_t^l, f_s^l) / MSE(f_t^l, 0)        L_feat = sum over blocks l

The division takes out the scale of a block's features, which differs by orders of magnitude from
block to block; a student that outputs zeros has loss 1 per block.

B batch   T tokens or frames   D features of a block's output   (B, T, D) throughout
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of SquareHead."""

    weight: float = 1.0  # of L_feat in the whole loss (1 in the study)
    epsilon: float = 1e-8  # added to the denominator; larger ones mute blocks of small norm

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, not {self.weight}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, not {self.epsilon}")


def block_loss(teacher: Tensor, student: Tensor, mask: Tensor | None, epsilon: float) -> Tensor:
    """L_feat of one block, a scalar.

    Args:
        teacher, student: (B, T, D); gradients flow to the student only.
        mask: (B, T), non-zero on real tokens; None if all are real.
        epsilon: added to the denominator (a mean square).

    Raises:
        ValueError: shapes that differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher features are {tuple(teacher.shape)}, student's {tuple(student.shape)}"
        )
    teacher = teacher.detach().float()
    difference = (teacher - student.float()).square()
    energy = teacher.square()
    if mask is not None:
        if mask.shape != teacher.shape[:2]:
            raise ValueError(f"the mask is {tuple(mask.shape)}, tokens {tuple(teacher.shape[:2])}")
        # Selected, not multiplied: whatever stands in the padding (even NaN) has no effect.
        real = (mask != 0)[:, :, None]
        difference = torch.where(real, difference, 0.0)
        energy = torch.where(real, energy, 0.0)
        entries = real.sum().clamp(min=1) * teacher.shape[2]  # no real token: no loss
        return (difference.sum() / entries) / (energy.sum() / entries + epsilon)
    return difference.mean() / (energy.mean() + epsilon)


def loss(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None,
    settings: Settings,
) -> Tensor:
    """weight * L_feat, summed (not averaged) over all blocks.

    `mask` is one for all blocks, or one per block (an encoder's and a decoder's differ).
    Raises ValueError if teacher and student have different numbers of blocks.
    """
    if len(teacher) != len(student) or not teacher:
        raise ValueError(
            f"{len(teacher)} teacher blocks against {len(student)} of the student; they pair up"
        )
    masks = [mask] * len(teacher) if mask is None or isinstance(mask, Tensor) else list(mask)
    terms = [
        block_loss(t, s, m, settings.epsilon)
        for t, s, m in zip(teacher, student, masks, strict=True)
    ]
    return settings.weight * torch.stack(terms).sum()

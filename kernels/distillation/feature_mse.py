"""Feature distillation without normalisation: the baseline that SquareHead improves on.

Source: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation (2), with the
mean over entries:  L = sum over blocks of MSE(f_t^l, f_s^l).  Blocks of large features dominate.

B batch   T tokens or frames   D features   (B, T, D) throughout
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of plain feature distillation."""

    weight: float = 1.0  # of the term in the whole loss

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, not {self.weight}")


def loss(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None,
    settings: Settings,
) -> Tensor:
    """weight * sum over blocks of the mean square difference over real tokens, a scalar.

    `mask` is (B, T), non-zero on real tokens, or None; one for all blocks, or one per block (an
    encoder's and a decoder's differ). Gradients flow to the student only.
    Raises ValueError for unequal numbers of blocks or shapes.
    """
    if len(teacher) != len(student) or not teacher:
        raise ValueError(
            f"{len(teacher)} teacher blocks against {len(student)} of the student; they pair up"
        )
    masks = [mask] * len(teacher) if mask is None or isinstance(mask, Tensor) else list(mask)
    total = student[0].new_zeros((), dtype=torch.float32)
    for t, s, m in zip(teacher, student, masks, strict=True):
        if t.shape != s.shape:
            raise ValueError(f"teacher features are {tuple(t.shape)}, student's {tuple(s.shape)}")
        difference = (t.detach().float() - s.float()).square()
        if m is not None:
            real = (m != 0)[:, :, None]
            entries = real.sum().clamp(min=1) * t.shape[2]  # no real token: no loss
            total = total + torch.where(real, difference, 0.0).sum() / entries
        else:
            total = total + difference.mean()
    return settings.weight * total

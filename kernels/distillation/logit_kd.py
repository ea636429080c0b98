"""Logit distillation: the student's distribution follows the teacher's.

Sources: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015
(temperature); E. Kurtic et al., arXiv 2310.06927, equation (6.1) of the book chapter:

    L_logit = 1/|P| sum_i KL(p_t(x_i) || p_s(x_i))      over real tokens P, teacher first

With temperature tau both distributions are softmax(z / tau) and the loss is multiplied by tau^2.

B batch   T tokens   V vocabulary or classes   (..., V) logits, (...) mask
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of logit distillation."""

    weight: float = 1.0  # of L_logit in the whole loss (1 in the study)
    temperature: float = 1.0  # tau (1 in the study)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, not {self.weight}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")


def loss(teacher: Tensor, student: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
    """weight * L_logit, a scalar; gradients flow to the student only.

    Args:
        teacher, student: logits (..., V).
        mask: (...), non-zero where the position predicts a real token; None if all do.

    Raises:
        ValueError: shapes that differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher logits are {tuple(teacher.shape)}, student's {tuple(student.shape)}"
        )
    tau = settings.temperature
    log_t = torch.log_softmax(teacher.detach().float() / tau, dim=-1)
    log_s = torch.log_softmax(student.float() / tau, dim=-1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    return settings.weight * tau**2 * _mean(divergence, mask)


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the predictive distributions in nats, a scalar.

    The study's diagnostic (its figure 6.3): without distillation a sparse student's entropy
    collapses, it grows over-confident.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return _mean(-(log_p.exp() * log_p).sum(dim=-1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(f"the mask is {tuple(mask.shape)}, positions {tuple(values.shape)}")
    real = mask != 0
    return torch.where(real, values, 0.0).sum() / real.sum().clamp(min=1)

"""Consistency under real augmentation: noisy or reverberant copies should keep their cluster.

Source: Fathan & Alam 2025, equation 10.7, whose direction is kept (augmented first):

    L_aug = mean_i KL(p(.|x_i^aug_r) || p(.|x_i)),   r random in {1..J} per sample

No stop-gradient is printed, so by default the gradient flows through both sides.

B batch, C clusters.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from goldcrest.kernels.clustering.terms.divergence import kl_divergence

FixedSide = Literal["none", "clean", "augmented"]


def augmentation_loss(clean: Tensor, augmented: Tensor, *, fixed: FixedSide = "none") -> Tensor:
    """Equation 10.7 for the logits (B, C) of samples and of their copies, paired by row.

    `fixed` names the side through which no gradient flows.
    """
    clean = clean.detach() if fixed == "clean" else clean
    augmented = augmented.detach() if fixed == "augmented" else augmented
    return kl_divergence(augmented, clean)

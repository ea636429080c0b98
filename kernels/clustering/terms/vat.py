"""Virtual adversarial training: the small push that changes a prediction most.

Source: Miyato et al. 2018 (VAT), algorithm 1, as used by IMSAT (Hu et al. 2017) for R_SAT.

    d ~ N(0, I), d <- d / |d|                                       per row
    repeat:  g = grad_d mean_i KL(p(.|x_i) || p(.|x_i + xi d_i));   d <- g / |g|
    r_i = eps_i d_i                                                 a constant in the outer gradient
    R_SAT = mean_i KL(sg[p(.|x_i)] || p(.|x_i + r_i))

IMSAT's xi = 10 is for MNIST rows of norm near 28; rows of unit norm need about 0.1. The KL is of
second order in xi: below 1e-3 it underflows in float32.

B batch, D input dimensions, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from goldcrest.kernels.clustering.terms.divergence import kl_divergence


def unit_rows(d: Tensor) -> Tensor:
    """Rows of d (B, D) at unit length; a row of zeros stays zero."""
    return d / d.norm(dim=1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)


def adversarial_perturbation(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    logits: Tensor,
    direction: Tensor,
    radius: Tensor,
    *,
    xi: float,
    iterations: int,
) -> Tensor:
    """The perturbation r (B, D) with |r_i| = eps_i that raises the divergence most.

    `predict` gives logits (B, C) without updating any statistics, `logits` are those of x (B, D),
    `direction` (B, D) is the random start, `radius` (B,) is eps. A row whose gradient is exactly
    zero keeps its direction. r carries no gradient, nor do the model's parameters get any.
    """
    target = logits.detach()
    d = unit_rows(direction)
    for _ in range(iterations):
        probe = d.detach().requires_grad_()
        with torch.enable_grad():
            divergence = kl_divergence(target, predict(x.detach() + xi * probe))
        (gradient,) = torch.autograd.grad(divergence, probe)
        d = torch.where(gradient.norm(dim=1, keepdim=True) > 0, unit_rows(gradient), d)
    return (radius[:, None] * d).detach()

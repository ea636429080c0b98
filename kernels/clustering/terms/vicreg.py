"""VICReg: invariance, variance and covariance of the logits.

Source: Bardes et al. 2022 (VICReg); Fathan & Alam 2025, section on VICReg, weights 1, 1, 0.5:

    s(Z, Z') = mean_i |Z_i - Z'_i|^2
    v(Z)     = 1/C sum_j max(0, gamma - sqrt(Var(Z^j) + 1e-4)),  gamma = 1, unbiased variance
    c(Z)     = 1/C sum_{i != j} Cov(Z)_ij^2

Variance and covariance are those of all workers' rows. In the study every sum with these terms
fails; they are here for its ablations.

B batch, W workers, C clusters.
"""

from __future__ import annotations

from torch import Tensor

from goldcrest.kernels.clustering.parallel import mean_over_workers, workers
from goldcrest.kernels.clustering.terms.divergence import full_precision

INVARIANCE, VARIANCE, COVARIANCE = 1.0, 1.0, 0.5
"""The study's weights of s, v and c."""


def invariance(z: Tensor, other: Tensor) -> Tensor:
    """s: mean squared distance of paired rows of z and other (B, C)."""
    return (full_precision(z) - full_precision(other)).square().sum(dim=1).mean()


def _centred(z: Tensor) -> tuple[Tensor, float]:
    """Rows less the mean of all workers' rows, and WB/(WB - 1), which makes a mean over
    rows an unbiased estimate."""
    z = full_precision(z)
    rows = len(z) * workers()
    return z - mean_over_workers(z.mean(dim=0)), rows / max(rows - 1, 1)


def variance(z: Tensor, *, gamma: float = 1.0) -> Tensor:
    """v: how far the standard deviations of the columns of z (B, C) fall short of gamma."""
    centred, unbias = _centred(z)
    variances = unbias * mean_over_workers(centred.square().mean(dim=0))
    return (gamma - (variances + 1e-4).sqrt()).relu().mean()


def covariance(z: Tensor) -> Tensor:
    """c: sum of squared covariances between different columns of z (B, C), over C. Memory C * C."""
    centred, unbias = _centred(z)
    products = unbias * mean_over_workers(centred.T @ centred / len(z))
    return (products.square().sum() - products.diagonal().square().sum()) / z.shape[1]


def vicreg_loss(z: Tensor, other: Tensor) -> Tensor:
    """s + [v(z) + v(other)] + 0.5 [c(z) + c(other)] for paired rows (B, C)."""
    spread = variance(z) + variance(other)
    return (
        INVARIANCE * invariance(z, other)
        + VARIANCE * spread
        + COVARIANCE * (covariance(z) + covariance(other))
    )

"""Gaussian mixture with full covariances, the UBM of the i-vector recipe.

Source: spec section 3.2; Kaldi `gmm/full-gmm.cc`, `gmm/mle-full-gmm.cc`.

Frames are first offered to a diagonal mixture (the diagonal part of this one), and only its best K
Gaussians are evaluated exactly:

    log w_g N(x; m_g, S_g) = log w_g - 1/2 (D log 2 pi + log|S_g| + |C_g^{-1} (x - m_g)|^2)

with S_g = C_g C_g^T. The fast path visits Gaussian by Gaussian all frames that selected it.

    T frames   G Gaussians   D feature dimensions   K selected Gaussians
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.ivector import diagonal_gmm
from goldcrest.kernels.ivector.diagonal_gmm import DiagonalGmm, GmmStatistics
from goldcrest.kernels.ivector.records import TensorRecord

__all__ = [
    "FullGmm",
    "FullGmmSettings",
    "accumulate",
    "from_diagonal",
    "log_likelihoods",
    "select",
    "to_diagonal",
    "update",
]


_BLOCK_VALUES = 1 << 23  # values of a block of (frames, Gaussians): 64 MB in float64


@dataclass(frozen=True, kw_only=True)
class FullGmmSettings:
    """EM of a full-covariance UBM (spec section 3.2)."""

    iterations: int = 4
    """EM passes over the data after the diagonal mixture."""
    selected: int = 20
    """K, Gaussians per frame that are evaluated exactly."""
    minimum_weight: float = 1e-5
    """Smallest mixture weight; Gaussians are never removed, so that G stays fixed."""
    minimum_count: float = 100.0
    """Frames that a Gaussian must own for its mean and covariance to be moved."""
    variance_floor: float = 1e-3
    """Smallest eigenvalue of a covariance, in squared feature units."""
    condition_limit: float = 1e4
    """Largest ratio between the eigenvalues of a covariance."""

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.selected < 1:
            raise ValueError("iterations must not be negative and selected at least 1")
        if not 0.0 <= self.minimum_weight < 1.0 or self.minimum_count < 0:
            raise ValueError("minimum_weight must lie in [0, 1), minimum_count not be negative")
        if self.variance_floor <= 0 or self.condition_limit < 1:
            raise ValueError("variance_floor must be positive and condition_limit at least 1")


@dataclass(frozen=True, kw_only=True)
class FullGmm(TensorRecord):
    """weights (G,), means (G, D), covariances (G, D, D)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


def from_diagonal(gmm: DiagonalGmm) -> FullGmm:
    """The same density as a full-covariance mixture."""
    return FullGmm(
        weights=gmm.weights, means=gmm.means, covariances=torch.diag_embed(gmm.variances)
    )


def to_diagonal(gmm: FullGmm) -> DiagonalGmm:
    """The mixture with the off-diagonal covariances dropped: the preselector."""
    variances = gmm.covariances.diagonal(dim1=1, dim2=2).clone()
    return DiagonalGmm(
        weights=gmm.weights,
        means=gmm.means,
        variances=variances,
        floor=torch.zeros_like(variances[0]),
    )


def log_likelihoods(frames: Tensor, gmm: FullGmm) -> Tensor:
    """log w_g N(x_t; m_g, S_g), every Gaussian exactly: (T, D) -> (T, G). The plain twin."""
    everything = torch.arange(gmm.weights.shape[0], device=frames.device)
    return _exact(frames, gmm, everything.expand(frames.shape[0], -1))


def select(frames: Tensor, gmm: FullGmm, count: int) -> tuple[Tensor, Tensor]:
    """Exact log-likelihoods of the `count` Gaussians that the diagonal part likes best.

    Returns:
        indices (T, K) int64 and log-likelihoods (T, K) in the model's dtype.
    """
    indices, _ = diagonal_gmm.select(frames, to_diagonal(gmm), count)
    return indices, _exact(frames, gmm, indices)


def accumulate(frames: Tensor, gmm: FullGmm, settings: FullGmmSettings) -> GmmStatistics:
    """E step over (T, D) frames; the sums `merge`, `second` is (G, D, D)."""
    occupancy = torch.zeros_like(gmm.weights)
    first = torch.zeros_like(gmm.means)
    second = torch.zeros_like(gmm.covariances)
    log_likelihood = gmm.means.new_zeros(())
    for part in frames.split(max(1, _BLOCK_VALUES // gmm.weights.shape[0])):
        indices, scores = select(part, gmm, settings.selected)
        evidence = scores.logsumexp(1)
        shares = (scores - evidence[:, None]).exp()
        log_likelihood += evidence.sum()
        x = part.to(gmm.means)
        for g, (t, k) in enumerate(_owners(indices, gmm.weights.shape[0])):
            mine, weight = x[t], shares[t, k]
            weighted = mine * weight[:, None]
            occupancy[g] += weight.sum()
            first[g] += weighted.sum(0)
            second[g].addmm_(weighted.T, mine)
    return GmmStatistics(
        occupancy=occupancy,
        first=first,
        second=second,
        log_likelihood=log_likelihood,
        frames=gmm.means.new_tensor(float(frames.shape[0])),
    )


def update(statistics: GmmStatistics, gmm: FullGmm, settings: FullGmmSettings) -> FullGmm:
    """M step with floored covariances; starved Gaussians keep their mean and covariance."""
    count = statistics.occupancy
    safe = count.clamp_min(1e-10)[:, None]
    means = statistics.first / safe
    covariances = statistics.second / safe[..., None] - means[:, :, None] * means[:, None, :]
    covariances = floor_eigenvalues(covariances, settings)
    moved = count >= settings.minimum_count
    weights = (count / statistics.frames.clamp_min(1)).clamp_min(settings.minimum_weight)
    return FullGmm(
        weights=weights / weights.sum(),
        means=torch.where(moved[:, None], means, gmm.means),
        covariances=torch.where(moved[:, None, None], covariances, gmm.covariances),
    )


def floor_eigenvalues(covariances: Tensor, settings: FullGmmSettings) -> Tensor:
    """Eigenvalues raised to max(variance_floor, largest / condition_limit): (G, D, D)."""
    values, vectors = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
    lowest = (values[:, -1:] / settings.condition_limit).clamp_min(settings.variance_floor)
    return (vectors * values.maximum(lowest)[:, None, :]) @ vectors.mT


def _exact(frames: Tensor, gmm: FullGmm, indices: Tensor) -> Tensor:
    """Exact log-likelihoods of the Gaussians in `indices` (T, K): (T, K)."""
    dimensions = gmm.means.shape[1]
    if frames.ndim != 2 or frames.shape[1] != dimensions:
        raise ValueError(
            f"the model was trained on {dimensions} feature dimensions, the frames are "
            f"{tuple(frames.shape)}"
        )
    x = frames.to(gmm.means)
    factors = torch.linalg.cholesky(gmm.covariances)
    identity = torch.eye(dimensions, dtype=x.dtype, device=x.device)
    whiten = torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
    log_determinant = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)
    constant = gmm.weights.log() - 0.5 * (dimensions * math.log(2 * math.pi) + log_determinant)
    scores = x.new_empty(indices.shape)
    for g, (t, k) in enumerate(_owners(indices, gmm.weights.shape[0])):
        white = (x[t] - gmm.means[g]) @ whiten[g].T
        scores[t, k] = constant[g] - 0.5 * white.square().sum(1)
    return scores


def _owners(indices: Tensor, gaussians: int) -> list[tuple[Tensor, Tensor]]:
    """For every Gaussian, the (frame, slot) pairs that selected it; one sort for all of them."""
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gaussians).tolist()
    slots = indices.shape[1]
    return [(part // slots, part % slots) for part in order.split(counts)]

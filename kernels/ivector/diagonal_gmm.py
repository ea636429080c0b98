"""Gaussian mixture with diagonal covariances, trained by EM with splitting.

Source: Reynolds, Quatieri, Dunn, "Speaker verification using adapted Gaussian mixture models"
(2000); the training schedule is that of Kaldi's `gmm-global-init-from-feats` and
`gmm-global-est`.

    E step   p_tg = w_g N(x_t; m_g, v_g) / sum_h w_h N(x_t; m_h, v_h)
    M step   w_g = n_g / n,   m_g = sum_t p_tg x_t / n_g,   v_g = sum_t p_tg x_t^2 / n_g - m_g^2

    T frames   G Gaussians   D feature dimensions   K selected Gaussians
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.ivector.records import Accumulator, TensorRecord

__all__ = [
    "DiagonalGmm",
    "DiagonalGmmSettings",
    "GmmStatistics",
    "accumulate",
    "initialise",
    "log_likelihoods",
    "log_likelihoods_reference",
    "select",
    "split",
    "train",
    "update",
]

_BLOCK_VALUES = 1 << 22  # values of a (frames, Gaussians) block: 32 MB in float64


@dataclass(frozen=True, kw_only=True)
class DiagonalGmmSettings:
    """Training of a diagonal UBM (spec section 3.2)."""

    gaussians: int = 2048
    """G, final number of Gaussians."""
    initial_gaussians: int | None = None
    """Gaussians before the first split; None for half of `gaussians`."""
    iterations: int = 20
    """EM iterations of `train` while the mixture grows and after."""
    minimum_weight: float = 1e-4
    """Smallest mixture weight; keep it below 1 / gaussians."""
    variance_floor: float = 1e-3
    """Smallest variance, as a share of the variance of all frames in that dimension."""
    minimum_count: float = 10.0
    """Frames that a Gaussian must own for its mean and variance to be moved."""
    split_factor: float = 0.1
    """Halves of a split Gaussian move apart by +- this many standard deviations, randomised."""

    def __post_init__(self) -> None:
        if self.gaussians < 1:
            raise ValueError(f"gaussians must be at least 1, not {self.gaussians}")
        initial = self.initial_gaussians
        if initial is not None and not 1 <= initial <= self.gaussians:
            raise ValueError(
                f"initial_gaussians must lie between 1 and gaussians ({self.gaussians}), "
                f"not {initial}"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        if not 0.0 <= self.minimum_weight < 1.0 / self.gaussians:
            raise ValueError(
                f"minimum_weight must lie in [0, 1 / gaussians) = [0, {1 / self.gaussians:.2g}), "
                f"not {self.minimum_weight}"
            )
        if self.variance_floor <= 0 or self.minimum_count < 0 or self.split_factor <= 0:
            raise ValueError(
                "variance_floor and split_factor must be positive, minimum_count not negative"
            )


@dataclass(frozen=True, kw_only=True)
class DiagonalGmm(TensorRecord):
    """weights (G,), means (G, D), variances (G, D); floor (D,): smallest variances allowed."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    floor: Tensor


@dataclass(frozen=True, kw_only=True)
class GmmStatistics(Accumulator):
    """Sums of one E step: occupancy (G,), first (G, D), second (G, D) or (G, D, D);
    log_likelihood () and frames () of the data."""

    occupancy: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    frames: Tensor


def initialise(
    frames: Tensor, settings: DiagonalGmmSettings, generator: torch.Generator
) -> DiagonalGmm:
    """A first mixture: random frames as means, the variance of all frames, equal weights.

    Args:
        frames: (T, D) float; the model takes float64.
        settings: see `DiagonalGmmSettings`.
        generator: the only source of randomness (a CPU generator).

    Raises:
        ValueError: fewer frames than Gaussians, or frames that are not finite.
    """
    if frames.ndim != 2 or frames.shape[0] < settings.gaussians:
        raise ValueError(
            f"{settings.gaussians} Gaussians need at least as many frames, given as (T, D); "
            f"got {tuple(frames.shape)}"
        )
    if not bool(torch.isfinite(frames).all()):
        raise ValueError("the frames hold values that are not finite (NaN or infinity)")
    count = settings.initial_gaussians or max(1, settings.gaussians // 2)
    frames = frames.double()
    chosen = torch.randperm(frames.shape[0], generator=generator)[:count].to(frames.device)
    variance = frames.var(dim=0, unbiased=False)
    # A dimension without any variance would make every likelihood infinite.
    variance = variance.clamp_min(1e-10)
    return DiagonalGmm(
        weights=torch.full((count,), 1.0 / count, dtype=torch.float64, device=frames.device),
        means=frames[chosen].clone(),
        variances=variance.expand(count, -1).clone(),
        floor=settings.variance_floor * variance,
    )


def log_likelihoods(frames: Tensor, gmm: DiagonalGmm) -> Tensor:
    """log w_g N(x_t; m_g, v_g) of every frame and Gaussian: (T, D) -> (T, G), one GEMM.

    The frames are shifted by the mean of the means first: the expanded square would otherwise
    lose digits to cancellation.

    Raises:
        ValueError: the frames do not have the model's D dimensions.
    """
    dimensions = gmm.means.shape[1]
    if frames.ndim != 2 or frames.shape[1] != dimensions:
        raise ValueError(
            f"the model was trained on {dimensions} feature dimensions, the frames are "
            f"{tuple(frames.shape)}"
        )
    centre = gmm.means.mean(0)
    x = frames.to(gmm.means) - centre
    means = gmm.means - centre
    precision = gmm.variances.reciprocal()
    linear = torch.cat([(means * precision), -0.5 * precision], dim=1)  # (G, 2 D)
    constant = gmm.weights.log() - 0.5 * (
        dimensions * math.log(2 * math.pi)
        + gmm.variances.log().sum(1)
        + (means.square() * precision).sum(1)
    )
    return torch.addmm(constant, torch.cat([x, x.square()], dim=1), linear.T)


def log_likelihoods_reference(frames: Tensor, gmm: DiagonalGmm) -> Tensor:
    """Plain twin of `log_likelihoods`: one frame and one Gaussian at a time."""
    out = torch.zeros(frames.shape[0], gmm.weights.shape[0], dtype=gmm.means.dtype)
    for t, x in enumerate(frames.to(gmm.means)):
        for g in range(gmm.weights.shape[0]):
            variance = gmm.variances[g]
            square = ((x - gmm.means[g]).square() / variance).sum()
            norm = (2 * math.pi * variance).log().sum()
            out[t, g] = gmm.weights[g].log() - 0.5 * (norm + square)
    return out


def select(frames: Tensor, gmm: DiagonalGmm, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best Gaussians of every frame: indices (T, K) int64, log-likelihoods (T, K)."""
    if count < 1:
        raise ValueError(f"at least one Gaussian must be selected, not {count}")
    best = log_likelihoods(frames, gmm).topk(min(count, gmm.weights.shape[0]), dim=1)
    return best.indices, best.values


def accumulate(frames: Tensor, gmm: DiagonalGmm, *, selected: int | None = None) -> GmmStatistics:
    """E step over some frames.

    Args:
        frames: (T, D) float.
        gmm: the present model; the sums take its dtype.
        selected: only the best `selected` Gaussians of a frame share it (30 in the recipe);
            None for all of them, which is exact.

    Returns:
        Sums that `merge` with those of other frames and feed `update`.
    """
    total = _empty(gmm)
    block = max(1, _BLOCK_VALUES // gmm.weights.shape[0])
    occupancy, first, second = total.occupancy, total.first, total.second
    log_likelihood = total.log_likelihood
    for part in frames.split(block):
        scores = log_likelihoods(part, gmm)
        if selected is not None and selected < scores.shape[1]:
            best = scores.topk(selected, dim=1)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, best.indices, best.values)
        evidence = scores.logsumexp(1)
        shares = (scores - evidence[:, None]).exp()
        x = part.to(gmm.means)
        occupancy = occupancy + shares.sum(0)
        first = first + shares.T @ x
        second = second + shares.T @ x.square()
        log_likelihood = log_likelihood + evidence.sum()
    return GmmStatistics(
        occupancy=occupancy,
        first=first,
        second=second,
        log_likelihood=log_likelihood,
        frames=total.frames + frames.shape[0],
    )


def update(
    statistics: GmmStatistics, gmm: DiagonalGmm, settings: DiagonalGmmSettings
) -> DiagonalGmm:
    """M step. Gaussians with fewer than `minimum_count` frames keep mean and variance."""
    count = statistics.occupancy
    safe = count.clamp_min(1e-10)[:, None]
    means = statistics.first / safe
    variances = (statistics.second / safe - means.square()).maximum(gmm.floor)
    moved = (count >= settings.minimum_count)[:, None]
    weights = (count / statistics.frames.clamp_min(1)).clamp_min(settings.minimum_weight)
    return DiagonalGmm(
        weights=weights / weights.sum(),
        means=torch.where(moved, means, gmm.means),
        variances=torch.where(moved, variances, gmm.variances),
        floor=gmm.floor,
    )


def split(
    gmm: DiagonalGmm, count: int, settings: DiagonalGmmSettings, generator: torch.Generator
) -> DiagonalGmm:
    """Grow to `count` Gaussians: halve the heaviest, move the halves apart at random."""
    weights, means, variances = gmm.weights.clone(), gmm.means, gmm.variances
    while weights.shape[0] < count:
        more = min(count - weights.shape[0], weights.shape[0])
        heavy = weights.topk(more).indices
        noise = torch.randn(more, means.shape[1], generator=generator, dtype=torch.float64)
        step = settings.split_factor * noise.to(means) * variances[heavy].sqrt()
        weights[heavy] /= 2
        weights = torch.cat([weights, weights[heavy]])
        means = torch.cat([means.index_add(0, heavy, -step), means[heavy] + step])
        variances = torch.cat([variances, variances[heavy]])
    return DiagonalGmm(weights=weights, means=means, variances=variances, floor=gmm.floor)


def train(
    frames: Tensor, settings: DiagonalGmmSettings, generator: torch.Generator
) -> tuple[DiagonalGmm, list[float]]:
    """Train in memory on (T, D) frames: start small, grow during the first half, then EM.

    Returns:
        The mixture (float64) and the log-likelihood per frame before every update.
    """
    gmm = initialise(frames, settings, generator)
    start = gmm.weights.shape[0]
    growing = max(1, settings.iterations // 2)
    history = []
    for iteration in range(settings.iterations):
        statistics = accumulate(frames, gmm)
        history.append(float(statistics.log_likelihood / statistics.frames))
        gmm = update(statistics, gmm, settings)
        target = start + (settings.gaussians - start) * (iteration + 1) // growing
        gmm = split(gmm, min(settings.gaussians, target), settings, generator)
    return gmm, history


def _empty(gmm: DiagonalGmm) -> GmmStatistics:
    zero = gmm.means.new_zeros(())
    return GmmStatistics(
        occupancy=torch.zeros_like(gmm.weights),
        first=torch.zeros_like(gmm.means),
        second=torch.zeros_like(gmm.means),
        log_likelihood=zero,
        frames=zero,
    )

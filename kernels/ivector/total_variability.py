"""The total-variability model: training by EM and extraction of i-vectors.

Source: Dehak et al. 2011; Kenny 2012; Kaldi `ivector/ivector-extractor.cc`; spec sections 3.4-3.8.

    frame of Gaussian i ~ N(m_i + M_i w, Sigma_i),     w ~ N(p e_0, I)

Two formulations of one model, and one set of equations for both:

    "augmented"  m_i = 0; column 0 of M_i holds the UBM mean / p, the prior mean p ("offset",
                 100 at first) sits on coordinate 0 (Kaldi)
    "centred"    m_i = UBM mean, p = 0: the zero-mean form of Dehak and Kenny

With F_i = X_i - gamma_i m_i and U_i = M_i^T Sigma_i^{-1} M_i:

    E step   L = I + sum_i gamma_i U_i,   b = p e_0 + sum_i M_i^T Sigma_i^{-1} F_i
             E[w] = L^{-1} b,   Cov[w] = L^{-1},   i-vector = E[w] - p e_0
    M step   M_i = Y_i R_i^{-1},   Y_i = sum F_i E[w]^T,   R_i = sum gamma_i (Cov + E E^T)
    then minimum divergence, always last: it changes the space that the sums live in.

    N utterances   G Gaussians   D feature dimensions   R i-vector dimensions   P = R (R + 1) / 2

Float64 throughout; symmetric R x R matrices travel packed (P), so that L is one GEMM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from goldcrest.kernels.ivector.full_gmm import FullGmm
from goldcrest.kernels.ivector.records import Accumulator, TensorRecord
from goldcrest.kernels.ivector.statistics import BaumWelch, Ubm

__all__ = [
    "TotalVariability",
    "TotalVariabilitySettings",
    "TotalVariabilitySums",
    "e_step",
    "extract",
    "extract_reference",
    "initialise",
    "m_step",
    "minimum_divergence",
    "objective",
    "posterior",
    "train",
    "update",
]

FORMULATIONS = ("augmented", "centred")

_BLOCK_VALUES = 1 << 24  # values of a block of (utterances, R, R): 128 MB in float64


@dataclass(frozen=True, kw_only=True)
class TotalVariabilitySettings:
    """Training of the total-variability model."""

    dimensions: int = 400
    """R, i-vector dimensions, the offset's coordinate included in "augmented"."""
    iterations: int = 5
    """EM iterations (the VoxCeleb recipe)."""
    formulation: str = "augmented"
    """"augmented" (Kaldi, offset prior) or "centred" (Dehak and Kenny, zero mean)."""
    offset: float = 100.0
    """p of "augmented" before training."""
    initial_scale: float = 1.0
    """Standard deviation of the random columns of M at the start."""
    update_covariances: bool = True
    """Re-estimate Sigma; needs second-order statistics."""
    minimum_count: float = 100.0
    """Occupancy (after the scaling of the statistics) below which a Gaussian is not updated."""
    covariance_floor: float = 0.1
    """Floor of Sigma_i as a share of the mean covariance, in the generalised-eigenvalue sense."""
    minimum_divergence: bool = True
    """Re-estimate the prior of w after every M step and fold it into M."""
    diagonalise: bool = True
    """Rotate w so that its dimensions are ordered by importance (with minimum divergence)."""

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            raise ValueError(
                f"formulation '{self.formulation}' is unknown; choose one of {FORMULATIONS}"
            )
        if self.dimensions < 2 or self.iterations < 0:
            raise ValueError("dimensions must be at least 2 and iterations not negative")
        if self.offset <= 0 or self.initial_scale <= 0:
            raise ValueError("offset and initial_scale must be positive")
        if self.minimum_count < 0 or not 0.0 <= self.covariance_floor <= 1.0:
            raise ValueError("minimum_count must not be negative, covariance_floor lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TotalVariability(TensorRecord):
    """means (G, D), matrices M (G, D, R), covariances (G, D) or (G, D, D), offset () = p,
    weights (G,) of the UBM (they only shift the objective)."""

    means: Tensor
    matrices: Tensor
    covariances: Tensor
    offset: Tensor
    weights: Tensor

    @property
    def dimensions(self) -> int:
        """R."""
        return self.matrices.shape[2]


@dataclass(frozen=True, kw_only=True)
class TotalVariabilitySums(Accumulator):
    """Sums of one E step over utterances; add those of shards with `records.merge`."""

    occupancy: Tensor
    """Gam (G,)."""
    first: Tensor
    """sum X, raw (G, D)."""
    outer: Tensor
    """Y (G, D, R)."""
    square: Tensor
    """R_i, packed (G, P)."""
    w_sum: Tensor
    """s1 (R,)."""
    w_square: Tensor
    """s2 (R, R)."""
    evidence: Tensor
    """sum of 1/2 b^T L^{-1} b - 1/2 log|L| - 1/2 p^2, ()."""
    utterances: Tensor
    """n, ()."""
    second: Tensor | None = None
    """sum S, raw (G, D) or (G, D, D); None when not kept."""


def initialise(
    ubm: Ubm, settings: TotalVariabilitySettings, generator: torch.Generator
) -> TotalVariability:
    """The model before training: UBM means and covariances, random directions."""
    covariances = ubm.covariances if isinstance(ubm, FullGmm) else ubm.variances
    gaussians, features = ubm.means.shape
    shape = (gaussians, features, settings.dimensions)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrices = (settings.initial_scale * noise).to(ubm.means.device)
    means, offset = ubm.means.double(), 0.0
    if settings.formulation == "augmented":
        offset = settings.offset
        matrices[:, :, 0] = means / offset
        means = torch.zeros_like(means)
    return TotalVariability(
        means=means,
        matrices=matrices,
        covariances=covariances.double(),
        offset=torch.tensor(offset, dtype=torch.float64, device=means.device),
        weights=ubm.weights.double(),
    )


def posterior(statistics: BaumWelch, model: TotalVariability) -> tuple[Tensor, Tensor]:
    """Exact posterior of w: means E[w] (N, R) and covariances (N, R, R), offset included."""
    _check(statistics, model)
    projected, packed = _precompute(model)
    gamma, first = statistics.gamma.double(), statistics.first.double()
    mean, factor, _ = _solve(gamma, first, model, projected, packed)
    return mean, torch.cholesky_inverse(factor)


def e_step(statistics: BaumWelch, model: TotalVariability) -> TotalVariabilitySums:
    """Sums of the E step over N utterances.

    Raises:
        ValueError: the statistics belong to another UBM.
    """
    _check(statistics, model)
    projected, packed = _precompute(model)
    gaussians, features, dimensions = model.matrices.shape
    row, column = _pack_indices(dimensions, model.matrices.device)
    sums = {
        "occupancy": torch.zeros_like(model.weights),
        "first": torch.zeros_like(model.means),
        "outer": torch.zeros_like(model.matrices),
        "square": torch.zeros_like(packed),
        "w_sum": model.matrices.new_zeros(dimensions),
        "w_square": model.matrices.new_zeros((dimensions, dimensions)),
        "evidence": model.matrices.new_zeros(()),
    }
    for gamma, first in _blocks(statistics, dimensions):
        mean, factor, evidence = _solve(gamma, first, model, projected, packed)
        moment = torch.cholesky_inverse(factor) + mean[:, :, None] * mean[:, None, :]
        centred = _centre(gamma, first, model).reshape(gamma.shape[0], -1)
        sums["occupancy"] += gamma.sum(0)
        sums["first"] += first.sum(0)
        sums["outer"] += (centred.T @ mean).reshape(gaussians, features, dimensions)
        sums["square"] += gamma.T @ moment[:, row, column]
        sums["w_sum"] += mean.sum(0)
        sums["w_square"] += moment.sum(0)
        sums["evidence"] += evidence.sum()
    second = statistics.second
    return TotalVariabilitySums(
        **sums,
        utterances=model.offset.new_tensor(float(len(statistics))),
        second=None if second is None else second.double(),
    )


def objective(sums: TotalVariabilitySums, model: TotalVariability) -> float:
    """Exact log-likelihood of the data under `model`, posteriors of the Gaussians held fixed.

    Spec section 3.7. `sums` must come from `e_step` with this very model. Without second-order
    statistics the term sum tr(Sigma^{-1} S) is left out: a constant while Sigma is fixed.
    """
    features = model.means.shape[1]
    precision_means = _precision_times(model.covariances, model.means[..., None])[..., 0]
    diagonal = model.covariances.ndim == 2
    if diagonal:
        log_determinant = model.covariances.log().sum(1)
    else:
        log_determinant = torch.linalg.slogdet(model.covariances).logabsdet
    norm = model.weights.log() - 0.5 * (features * math.log(2 * math.pi) + log_determinant)
    value = (sums.occupancy * norm).sum() + sums.evidence
    # The square of the centred frames, without S: -2 m^T Sigma^{-1} X + Gam m^T Sigma^{-1} m.
    value -= 0.5 * (sums.occupancy[:, None] * precision_means * model.means).sum()
    value += (precision_means * sums.first).sum()
    if sums.second is not None:
        second = sums.second
        if diagonal:
            variances = second if second.ndim == 2 else second.diagonal(dim1=1, dim2=2)
            value -= 0.5 * (variances / model.covariances).sum()
        else:
            value -= 0.5 * torch.einsum("gii->", torch.linalg.solve(model.covariances, second))
    return float(value)


def m_step(
    sums: TotalVariabilitySums, model: TotalVariability, settings: TotalVariabilitySettings
) -> TotalVariability:
    """New M and, if asked, new Sigma; Gaussians below `minimum_count` stay as they are.

    Raises:
        ValueError: the covariances are to be updated, but their statistics were not kept.
    """
    moved = sums.occupancy >= settings.minimum_count
    square = _unpack(sums.square[moved], model.dimensions)
    matrices = model.matrices.clone()
    factor = torch.linalg.cholesky(square)
    matrices[moved] = torch.cholesky_solve(sums.outer[moved].mT, factor).mT
    model = replace(model, matrices=matrices)
    if not settings.update_covariances or not bool(moved.any()):
        return model
    if sums.second is None or (model.covariances.ndim == 3 and sums.second.ndim == 2):
        raise ValueError(
            "update_covariances needs the second-order statistics of its kind: set "
            "second_order='diagonal' or 'full' in the statistics, or update_covariances=False"
        )
    covariances = model.covariances.clone()
    covariances[moved] = _covariances(sums, model, square, moved)
    covariances = _floor(covariances, sums.occupancy, moved, settings.covariance_floor)
    return replace(model, covariances=covariances)


def minimum_divergence(
    sums: TotalVariabilitySums, model: TotalVariability, settings: TotalVariabilitySettings
) -> TotalVariability:
    """Give w the prior that its posteriors had, then transform w so that it is standard again.

    Spec section 3.6. "augmented": a whitening followed by a Householder reflection that brings the
    mean back onto coordinate 0, the new p being its length. "centred": the mean of w moves into
    the means of the Gaussians.
    """
    mean = sums.w_sum / sums.utterances
    spread = sums.w_square / sums.utterances - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(0.5 * (spread + spread.T))
    root = values.clamp_min(1e-7).sqrt()
    whiten, colour = vectors.T / root[:, None], vectors * root
    centred = float(model.offset) == 0.0
    if centred:
        means, offset = model.means + model.matrices @ mean, model.offset
    else:
        white = whiten @ mean
        means, offset = model.means, white.norm()
        colour = colour @ _householder(white / offset)
    matrices = model.matrices @ colour
    if settings.diagonalise:
        kept = slice(0 if centred else 1, None)
        importance = _importance(matrices[:, :, kept], model.covariances, sums.occupancy)
        rotation = torch.linalg.eigh(importance).eigenvectors.flip(1)
        matrices[:, :, kept] = matrices[:, :, kept] @ rotation
    return replace(model, means=means, matrices=matrices, offset=offset)


def update(
    sums: TotalVariabilitySums, model: TotalVariability, settings: TotalVariabilitySettings
) -> TotalVariability:
    """One whole update: M step, then minimum divergence where the settings ask for it."""
    model = m_step(sums, model, settings)
    return minimum_divergence(sums, model, settings) if settings.minimum_divergence else model


def train(
    statistics: BaumWelch, ubm: Ubm, settings: TotalVariabilitySettings, generator: torch.Generator
) -> tuple[TotalVariability, list[float]]:
    """Train in memory; returns the model and the objective per frame before every update."""
    model = initialise(ubm, settings, generator)
    history = []
    for _ in range(settings.iterations):
        sums = e_step(statistics, model)
        history.append(objective(sums, model) / max(1e-10, float(sums.occupancy.sum())))
        model = update(sums, model, settings)
    return model, history


def extract(statistics: BaumWelch, model: TotalVariability, *, scale: float = 1.0) -> Tensor:
    """i-vectors E[w] - p e_0 of N utterances, batched.

    Args:
        statistics: gamma (N, G) and first (N, G, D).
        model: the trained model.
        scale: one more factor on the statistics (see `StatisticsSettings.scale`).

    Returns:
        (N, R) float64; an utterance without frames gives the zero vector.

    Raises:
        ValueError: the statistics belong to another UBM, or `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    _check(statistics, model)
    projected, packed = _precompute(model)
    parts = [model.matrices.new_zeros((0, model.dimensions))]
    for gamma, first in _blocks(statistics, model.dimensions):
        parts.append(_solve(scale * gamma, scale * first, model, projected, packed)[0])
    vectors = torch.cat(parts)
    vectors[:, 0] -= model.offset
    return vectors


def extract_reference(statistics: BaumWelch, model: TotalVariability) -> Tensor:
    """Plain twin of `extract`: utterance by utterance, Gaussian by Gaussian."""
    full = model.covariances.ndim == 3
    vectors = []
    for gamma, first in zip(statistics.gamma.double(), statistics.first.double(), strict=True):
        precision = torch.eye(model.dimensions, dtype=torch.float64)
        linear = torch.zeros(model.dimensions, dtype=torch.float64)
        linear[0] = model.offset
        for g, matrix in enumerate(model.matrices):
            covariance = model.covariances[g] if full else torch.diag(model.covariances[g])
            weighted = torch.linalg.solve(covariance, matrix)
            precision += gamma[g] * matrix.T @ weighted
            linear += weighted.T @ (first[g] - gamma[g] * model.means[g])
        vector = torch.linalg.solve(precision, linear)
        vector[0] -= model.offset
        vectors.append(vector)
    return torch.stack(vectors)


def _check(statistics: BaumWelch, model: TotalVariability) -> None:
    if statistics.first.shape[1:] != model.means.shape:
        raise ValueError(
            f"the model has (Gaussians, dimensions) = {tuple(model.means.shape)}, the statistics "
            f"{tuple(statistics.first.shape[1:])}: they come from another UBM or other features"
        )


def _blocks(statistics: BaumWelch, dimensions: int) -> list[tuple[Tensor, Tensor]]:
    """The statistics in blocks whose (n, R, R) matrices fit in memory, float64."""
    size = max(1, _BLOCK_VALUES // dimensions**2)
    pairs = zip(statistics.gamma.split(size), statistics.first.split(size), strict=True)
    return [(gamma.double(), first.double()) for gamma, first in pairs]


def _pack_indices(dimensions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.tril_indices(dimensions, dimensions, device=device)
    return row, column


def _unpack(packed: Tensor, dimensions: int) -> Tensor:
    """Packed symmetric matrices (n, P) to (n, R, R); a gather is faster than two scatters."""
    row, column = _pack_indices(dimensions, packed.device)
    place = torch.empty((dimensions, dimensions), dtype=torch.long, device=packed.device)
    place[row, column] = place[column, row] = torch.arange(row.shape[0], device=packed.device)
    return packed.index_select(1, place.reshape(-1)).reshape(-1, dimensions, dimensions)


def _precision_times(covariances: Tensor, matrices: Tensor) -> Tensor:
    """Sigma_i^{-1} M_i for diagonal (G, D) or full (G, D, D) covariances."""
    if covariances.ndim == 2:
        return matrices / covariances[..., None]
    return torch.cholesky_solve(matrices, torch.linalg.cholesky(covariances))


def _precompute(model: TotalVariability) -> tuple[Tensor, Tensor]:
    """Sigma^{-1} M as one (G D, R) matrix, and U packed (G, P)."""
    weighted = _precision_times(model.covariances, model.matrices)
    row, column = _pack_indices(model.dimensions, model.matrices.device)
    packed = weighted.new_empty((weighted.shape[0], row.shape[0]))
    for g, (matrix, mine) in enumerate(zip(model.matrices, weighted, strict=True)):
        packed[g] = (matrix.T @ mine)[row, column]  # one R x R at a time: G of them are gigabytes
    return weighted.reshape(-1, model.dimensions), packed


def _centre(gamma: Tensor, first: Tensor, model: TotalVariability) -> Tensor:
    return first - gamma[..., None] * model.means


def _solve(
    gamma: Tensor, first: Tensor, model: TotalVariability, projected: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """E[w] (n, R), the Cholesky factor of L (n, R, R), the evidence of every utterance (n,)."""
    precision = _unpack(gamma @ packed, model.dimensions)
    precision.diagonal(dim1=1, dim2=2).add_(1.0)
    linear = _centre(gamma, first, model).reshape(gamma.shape[0], -1) @ projected
    linear[:, 0] += model.offset
    factor = torch.linalg.cholesky(precision)  # eigenvalues of L are >= 1
    mean = torch.cholesky_solve(linear[..., None], factor)[..., 0]
    log_determinant = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    evidence = 0.5 * ((linear * mean).sum(1) - log_determinant - model.offset.square())
    return mean, factor, evidence


def _covariances(
    sums: TotalVariabilitySums, model: TotalVariability, square: Tensor, moved: Tensor
) -> Tensor:
    """Sigma_i of the Gaussians that are moved, before flooring (spec section 3.5)."""
    assert sums.second is not None
    count, first = sums.occupancy[moved], sums.first[moved]
    means, matrices, outer = model.means[moved], model.matrices[moved], sums.outer[moved]
    if model.covariances.ndim == 2:
        second = sums.second[moved]
        if second.ndim == 3:
            second = second.diagonal(dim1=1, dim2=2)
        second = second - 2 * means * first + count[:, None] * means.square()
        explained = 2 * (outer * matrices).sum(2) - ((matrices @ square) * matrices).sum(2)
        return (second - explained) / count[:, None]
    cross = means[:, :, None] * first[:, None, :]
    own = count[:, None, None] * means[:, :, None] * means[:, None, :]
    product = outer @ matrices.mT
    second = sums.second[moved] - cross - cross.mT + own
    residual = second - product - product.mT + matrices @ square @ matrices.mT
    return 0.5 * (residual + residual.mT) / count[:, None, None]


def _floor(covariances: Tensor, occupancy: Tensor, moved: Tensor, share: float) -> Tensor:
    """Raise the moved covariances to `share` of the occupancy-weighted mean of all of them."""
    weight = occupancy / occupancy.sum()
    if covariances.ndim == 2:
        floor = share * (weight[:, None] * covariances).sum(0)
        covariances[moved] = covariances[moved].maximum(floor)
        return covariances
    mean = (weight[:, None, None] * covariances).sum(0)
    factor = torch.linalg.cholesky(mean)
    relative = torch.linalg.solve_triangular(factor, covariances[moved], upper=False)
    relative = torch.linalg.solve_triangular(factor, relative.mT, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (relative + relative.mT))
    vectors = factor @ vectors
    covariances[moved] = (vectors * values.clamp_min(share)[:, None, :]) @ vectors.mT
    return covariances


def _householder(direction: Tensor) -> Tensor:
    """The reflection that takes the unit vector `direction` to e_0; the identity at e_0."""
    identity = torch.eye(direction.shape[0], dtype=direction.dtype, device=direction.device)
    gap = 1.0 - direction[0]
    if float(gap) <= 1e-12:  # Kaldi divides by the square root of this without a guard
        return identity
    axis = (direction - identity[0]) / (2.0 * gap).sqrt()
    return identity - 2.0 * torch.outer(axis, axis)


def _importance(matrices: Tensor, covariances: Tensor, occupancy: Tensor) -> Tensor:
    """Occupancy-weighted mean of U_i."""
    weighted = _precision_times(covariances, matrices) * occupancy[:, None, None]
    gaussians, features, dimensions = matrices.shape
    flat = matrices.reshape(gaussians * features, dimensions)
    return flat.T @ weighted.reshape(gaussians * features, dimensions) / occupancy.sum()

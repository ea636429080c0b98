"""Probabilistic linear discriminant analysis, two-covariance form, as a verification back end.

Source: Ioffe, "Probabilistic linear discriminant analysis" (2006); Brummer and de Villiers, "The
speaker partitioning problem" (2010). Two-covariance model of a speaker s and her vectors x:

    y_s ~ N(mean, B),      x ~ N(y_s, W)

    E step   n vectors of a speaker with mean xbar: C = (B^{-1} + n W^{-1})^{-1},
             E[y] = mean + C n W^{-1} (xbar - mean)
    M step   B = mean over speakers of (C + (E[y] - mean)(E[y] - mean)^T)
             W = mean over vectors of ((x - E[y])(x - E[y])^T + C)
    score    log N([a; b]; same speaker) - log N([a; b]; two speakers)

    N vectors   R dimensions   S speakers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.ivector.lda import class_covariances
from goldcrest.kernels.ivector.records import TensorRecord

__all__ = ["Plda", "PldaSettings", "fit_plda", "score", "score_reference"]


@dataclass(frozen=True, kw_only=True)
class PldaSettings:
    """Training of the two-covariance model."""

    iterations: int = 10
    """EM iterations (Kaldi's default)."""
    ridge: float = 1e-6
    """Added to both covariances, as a share of the total variance per dimension."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        if self.ridge < 0:
            raise ValueError(f"ridge must not be negative, not {self.ridge}")


@dataclass(frozen=True, kw_only=True)
class Plda(TensorRecord):
    """mean (R,), between (R, R) = B, within (R, R) = W."""

    mean: Tensor
    between: Tensor
    within: Tensor


def fit_plda(vectors: Tensor, labels: Tensor, settings: PldaSettings) -> tuple[Plda, list[float]]:
    """EM on labelled vectors.

    Args:
        vectors: (N, R) float, usually length-normalised.
        labels: (N,) int, the speakers.
        settings: see `PldaSettings`.

    Returns:
        The model and the log-likelihood per vector before every update.

    Raises:
        ValueError: fewer than two speakers, or no speaker with two vectors.
    """
    within, between = class_covariances(vectors, labels)
    x = vectors.double()
    _, index = labels.unique(return_inverse=True)
    counts = torch.bincount(index)
    if int(counts.max()) < 2:
        raise ValueError("PLDA needs a speaker with at least two vectors")
    size = x.shape[1]
    ridge = settings.ridge * float((within + between).trace()) / size * torch.eye(size).to(x)
    model = Plda(mean=x.mean(0), between=between + ridge, within=within + ridge)
    centred = x - model.mean
    sums = x.new_zeros((counts.shape[0], size)).index_add_(0, index, centred)
    scatter = centred.T @ centred
    history = []
    for _ in range(settings.iterations):
        history.append(_log_likelihood(model, sums, counts, scatter) / x.shape[0])
        model = _em(model, sums, counts, scatter, ridge)
    return model, history


def score(enrol: Tensor, test: Tensor, model: Plda) -> Tensor:
    """Log-likelihood ratios of all pairs: (N, R), (M, R) -> (N, M) float64.

    With T = B + W and the joint covariance [[T, B], [B, T]], the ratio is the quadratic form
    1/2 a^T Q a + 1/2 b^T Q b + a^T P b + constant.
    """
    a, b = enrol.double() - model.mean, test.double() - model.mean
    total = model.between + model.within
    joint = torch.linalg.inv(_joint(model))
    size = total.shape[0]
    q = torch.linalg.inv(total) - joint[:size, :size]
    p = -joint[:size, size:]
    constant = torch.linalg.slogdet(total).logabsdet
    constant = constant - 0.5 * torch.linalg.slogdet(_joint(model)).logabsdet
    own = 0.5 * ((a @ q) * a).sum(1)[:, None] + 0.5 * ((b @ q) * b).sum(1)[None, :]
    return own + a @ p @ b.T + constant


def score_reference(enrol: Tensor, test: Tensor, model: Plda) -> Tensor:
    """Plain twin of `score`: the ratio of two Gaussian densities, pair by pair."""
    zero = torch.zeros_like(model.mean)
    total = torch.distributions.MultivariateNormal(zero, model.between + model.within)
    joint = torch.distributions.MultivariateNormal(torch.cat([zero, zero]), _joint(model))
    out = torch.zeros(enrol.shape[0], test.shape[0], dtype=torch.float64)
    for i, a in enumerate(enrol.double() - model.mean):
        for j, b in enumerate(test.double() - model.mean):
            same = joint.log_prob(torch.cat([a, b]))
            out[i, j] = same - total.log_prob(a) - total.log_prob(b)
    return out


def _joint(model: Plda) -> Tensor:
    """Covariance of two vectors of one speaker, (2 R, 2 R)."""
    total = model.between + model.within
    top = torch.cat([total, model.between], dim=1)
    bottom = torch.cat([model.between, total], dim=1)
    return torch.cat([top, bottom])


def _em(model: Plda, sums: Tensor, counts: Tensor, scatter: Tensor, ridge: Tensor) -> Plda:
    """One EM iteration; speakers with equally many vectors share their posterior covariance."""
    precise_b, precise_w = torch.linalg.inv(model.between), torch.linalg.inv(model.within)
    between, within = torch.zeros_like(scatter), scatter.clone()
    for n in counts.unique().tolist():
        mine = counts == n
        speakers = int(mine.sum())
        covariance = torch.linalg.inv(precise_b + n * precise_w)
        y = sums[mine] @ precise_w @ covariance
        moment = y.T @ y + speakers * covariance
        cross = sums[mine].T @ y
        between += moment
        within += n * moment - cross - cross.T
    between = between / counts.shape[0] + ridge
    within = within / counts.sum() + ridge
    return Plda(
        mean=model.mean,
        between=0.5 * (between + between.T),
        within=0.5 * (within + within.T),
    )


def _log_likelihood(model: Plda, sums: Tensor, counts: Tensor, scatter: Tensor) -> float:
    """Exact log-likelihood of all vectors, up to the constant -N R / 2 log 2 pi."""
    precise_b, precise_w = torch.linalg.inv(model.between), torch.linalg.inv(model.within)
    log_w = torch.linalg.slogdet(model.within).logabsdet
    log_b = torch.linalg.slogdet(model.between).logabsdet
    value = -0.5 * ((precise_w * scatter).sum() + counts.sum() * log_w)
    for n in counts.unique().tolist():
        mine = counts == n
        precision = precise_b + n * precise_w
        linear = sums[mine] @ precise_w
        value += 0.5 * ((linear @ torch.linalg.inv(precision)) * linear).sum()
        log_precision = torch.linalg.slogdet(precision).logabsdet
        value -= 0.5 * int(mine.sum()) * (log_b + log_precision)
    return float(value)

"""Baum-Welch statistics of utterances against a UBM.

Source: spec section 3.3; Kaldi `ivectorbin/ivector-extractor-acc-stats.cc`.

    p_ti = posterior of Gaussian i for frame t: the best K by the UBM, those below a minimum
           dropped, renormalised
    gamma_i = sum_t p_ti      X_i = sum_t p_ti x_t      S_i = sum_t p_ti x_t x_t^T

Raw sums, not centred. S is only ever needed summed over utterances, so it is kept that way.

    N utterances   T frames   G Gaussians   D feature dimensions   K selected Gaussians
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.ivector import diagonal_gmm, full_gmm
from goldcrest.kernels.ivector.diagonal_gmm import DiagonalGmm
from goldcrest.kernels.ivector.full_gmm import FullGmm
from goldcrest.kernels.ivector.records import TensorRecord

__all__ = [
    "BaumWelch",
    "StatisticsSettings",
    "Ubm",
    "baum_welch",
    "baum_welch_reference",
    "concatenate",
    "posteriors",
    "scale",
]

Ubm = DiagonalGmm | FullGmm

SECOND_ORDER = ("none", "diagonal", "full")

_BLOCK_VALUES = 1 << 23  # values of a block of (frames, Gaussians): 64 MB in float64


@dataclass(frozen=True, kw_only=True)
class StatisticsSettings:
    """How frames are shared among Gaussians and how much they count."""

    selected: int = 20
    """K, Gaussians per frame that get a share (preselected by the diagonal part of the UBM)."""
    minimum_posterior: float = 0.025
    """Smaller shares are dropped and the rest renormalised; 0 keeps all."""
    second_order: str = "none"
    """"none", "diagonal" or "full": which S is summed, for the update of the covariances."""
    scale: float = 1.0
    """Factor on all statistics. Frames 10 ms apart are correlated, so that n of them carry the
    evidence of fewer independent ones; below 1 it keeps the posterior from being overconfident."""
    maximum_count: float = 0.0
    """Largest sum of gamma per utterance after `scale` (Kaldi's max-count); 0 for no limit."""

    def __post_init__(self) -> None:
        if self.selected < 1:
            raise ValueError(f"selected must be at least 1, not {self.selected}")
        if not 0.0 <= self.minimum_posterior < 1.0:
            raise ValueError(f"minimum_posterior must lie in [0, 1), not {self.minimum_posterior}")
        if self.second_order not in SECOND_ORDER:
            raise ValueError(
                f"second_order '{self.second_order}' is unknown; choose one of {SECOND_ORDER}"
            )
        if self.scale <= 0 or self.maximum_count < 0:
            raise ValueError("scale must be positive and maximum_count not negative")


@dataclass(frozen=True, kw_only=True)
class BaumWelch(TensorRecord):
    """gamma (N, G), first (N, G, D); second (G, D) or (G, D, D) summed over the N, or None."""

    gamma: Tensor
    first: Tensor
    second: Tensor | None = None

    def __len__(self) -> int:
        return self.gamma.shape[0]


def posteriors(frames: Tensor, ubm: Ubm, settings: StatisticsSettings) -> tuple[Tensor, Tensor]:
    """Pruned posteriors of every frame.

    Args:
        frames: (T, D) float.
        ubm: a diagonal or a full-covariance mixture.
        settings: see `StatisticsSettings`.

    Returns:
        indices (T, K) int64 and shares (T, K) in the UBM's dtype, rows summing to 1; dropped
        shares are 0. The best Gaussian is never dropped.
    """
    family = full_gmm if isinstance(ubm, FullGmm) else diagonal_gmm
    indices, scores = family.select(frames, ubm, settings.selected)
    return indices, _prune(scores.softmax(dim=1), settings)


def baum_welch(utterances: Sequence[Tensor], ubm: Ubm, settings: StatisticsSettings) -> BaumWelch:
    """Statistics of utterances, in large blocks of frames whatever their lengths.

    Args:
        utterances: N matrices (T_n, D) float; T_n may be 0.
        ubm: a diagonal or a full-covariance mixture.
        settings: see `StatisticsSettings`; `scale` and `maximum_count` are applied.

    Returns:
        Statistics in the UBM's dtype, (N, G) and (N, G, D) of them; work memory is bounded.

    Raises:
        ValueError: an utterance has other dimensions than the UBM.
    """
    gaussians, dimensions = ubm.means.shape
    for n, utterance in enumerate(utterances):
        if utterance.ndim != 2 or utterance.shape[1] != dimensions:
            raise ValueError(
                f"the UBM has {dimensions} feature dimensions, utterance {n} is "
                f"{tuple(utterance.shape)}"
            )
    lengths = [u.shape[0] for u in utterances]
    gamma = ubm.means.new_zeros((len(lengths), gaussians))
    first = ubm.means.new_zeros((len(lengths), gaussians, dimensions))
    weights = [_weight(length, settings) for length in lengths]
    second = _no_second_order(ubm, settings.second_order)
    for frames, spans in _blocks(utterances, lengths, ubm):
        dense = _dense_posteriors(frames, ubm, settings)
        for n, part in spans:
            dense[part] *= weights[n]
            gamma[n] += dense[part].sum(0)
            first[n].addmm_(dense[part].T, frames[part])
        if second is not None:
            second += _second_order(frames, dense, settings.second_order)
    return BaumWelch(gamma=gamma, first=first, second=second)


def baum_welch_reference(
    utterances: Sequence[Tensor], ubm: Ubm, settings: StatisticsSettings
) -> BaumWelch:
    """Plain twin of `baum_welch`: one frame and one Gaussian at a time."""
    gaussians, dimensions = ubm.means.shape
    gamma = ubm.means.new_zeros((len(utterances), gaussians))
    first = ubm.means.new_zeros((len(utterances), gaussians, dimensions))
    full = ubm.means.new_zeros((gaussians, dimensions, dimensions))
    for n, utterance in enumerate(utterances):
        weight = _weight(utterance.shape[0], settings)
        for x in utterance.to(ubm.means):
            indices, shares = posteriors(x[None], ubm, settings)
            for g, share in zip(indices[0].tolist(), shares[0].tolist(), strict=True):
                gamma[n, g] += weight * share
                first[n, g] += weight * share * x
                full[g] += weight * share * torch.outer(x, x)
    second = {
        "none": None,
        "diagonal": full.diagonal(dim1=1, dim2=2).clone(),
        "full": full,
    }[settings.second_order]
    return BaumWelch(gamma=gamma, first=first, second=second)


def scale(statistics: BaumWelch, factor: float) -> BaumWelch:
    """All statistics times `factor`, as if every frame counted `factor` times."""
    if factor <= 0:
        raise ValueError(f"the factor must be positive, not {factor}")
    return BaumWelch(**{k: factor * v for k, v in statistics.to_tensors().items()})


def concatenate(parts: Sequence[BaumWelch]) -> BaumWelch:
    """The statistics of all utterances of `parts`, in order."""
    seconds = [p.second for p in parts if p.second is not None]
    if len(seconds) not in (0, len(parts)):
        raise ValueError("only some of the parts kept second-order statistics")
    return BaumWelch(
        gamma=torch.cat([p.gamma for p in parts]),
        first=torch.cat([p.first for p in parts]),
        second=torch.stack(seconds).sum(0) if seconds else None,
    )


def _weight(frames: int, settings: StatisticsSettings) -> float:
    """What a frame of an utterance of so many frames counts."""
    count = settings.scale * frames
    if settings.maximum_count and count > settings.maximum_count:
        return settings.scale * settings.maximum_count / count
    return settings.scale


def _prune(shares: Tensor, settings: StatisticsSettings) -> Tensor:
    """Drop small shares, never the best, and renormalise the rows."""
    if settings.minimum_posterior == 0:
        return shares
    keep = shares >= settings.minimum_posterior
    keep |= shares == shares.amax(dim=1, keepdim=True)
    shares = shares * keep
    return shares / shares.sum(dim=1, keepdim=True)


def _dense_posteriors(frames: Tensor, ubm: Ubm, settings: StatisticsSettings) -> Tensor:
    """`posteriors` written into a (T, G) matrix; no selection where all Gaussians are asked for."""
    gaussians = ubm.weights.shape[0]
    if settings.selected >= gaussians and isinstance(ubm, DiagonalGmm):
        scores = diagonal_gmm.log_likelihoods(frames, ubm)
        return _prune(scores.softmax(dim=1), settings)
    indices, shares = posteriors(frames, ubm, settings)
    return shares.new_zeros((frames.shape[0], gaussians)).scatter_(1, indices, shares)


def _blocks(
    utterances: Sequence[Tensor], lengths: Sequence[int], ubm: Ubm
) -> Iterator[tuple[Tensor, list[tuple[int, slice]]]]:
    """Frames in blocks of bounded size, each with the (utterance, slice of the block) it holds."""
    size = max(1, _BLOCK_VALUES // ubm.weights.shape[0])
    parts: list[Tensor] = []
    spans: list[tuple[int, slice]] = []
    filled = 0
    for n, length in enumerate(lengths):
        done = 0
        while done < length:
            taken = min(length - done, size - filled)
            parts.append(utterances[n][done : done + taken].to(ubm.means))
            spans.append((n, slice(filled, filled + taken)))
            done, filled = done + taken, filled + taken
            if filled == size:
                yield torch.cat(parts), spans
                parts, spans, filled = [], [], 0
    if parts:
        yield torch.cat(parts), spans


def _no_second_order(ubm: Ubm, kind: str) -> Tensor | None:
    gaussians, dimensions = ubm.means.shape
    if kind == "none":
        return None
    shape = (gaussians, dimensions) if kind == "diagonal" else (gaussians, dimensions, dimensions)
    return ubm.means.new_zeros(shape)


def _second_order(frames: Tensor, shares: Tensor, kind: str) -> Tensor:
    if kind == "diagonal":
        return shares.T @ frames.square()
    gaussians, dimensions = shares.shape[1], frames.shape[1]
    second = frames.new_zeros((gaussians, dimensions, dimensions))
    for g in range(gaussians):  # only the frames that Gaussian g has a share in
        mine = shares[:, g].nonzero()[:, 0]
        x = frames[mine]
        second[g] = (x * shares[mine, g, None]).T @ x
    return second

"""Batched posteriors and extraction against the loops of a textbook, in one run on one thread.

The floors (6x and 15x) are ratios of times measured in the same process, best of several, so that
they say something about the algorithm and not about the machine. The short form has a tenth of the
recordings and claims no more than that batches are faster at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from goldcrest.kernels.ivector import statistics as bw
from goldcrest.kernels.ivector import total_variability as tv
from goldcrest.kernels.ivector.diagonal_gmm import DiagonalGmm
from goldcrest.kernels.ivector.statistics import StatisticsSettings

GAUSSIANS, FEATURES, DIMENSIONS = 128, 60, 100


class Size(NamedTuple):
    """How much is measured, and how many times faster it has to be."""

    utterances: int
    frames: int
    posteriors: float
    extraction: float


SIZES = [
    pytest.param(Size(10, 50, posteriors=1, extraction=1), id="short"),
    pytest.param(Size(100, 200, posteriors=6, extraction=15), id="long", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best_of(runs: int, call: Callable[[], object]) -> float:
    """Shortest wall time of `runs` calls, in seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def example(size: Size) -> tuple[DiagonalGmm, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(GAUSSIANS, FEATURES, generator=g, dtype=torch.float64)
    ubm = DiagonalGmm(
        weights=torch.full((GAUSSIANS,), 1 / GAUSSIANS, dtype=torch.float64),
        means=means,
        variances=0.5 + torch.rand(GAUSSIANS, FEATURES, generator=g, dtype=torch.float64),
        floor=torch.zeros(FEATURES, dtype=torch.float64),
    )
    owner = torch.randint(0, GAUSSIANS, (size.utterances, size.frames), generator=g)
    noise = torch.randn(*owner.shape, FEATURES, generator=g, dtype=torch.float64)
    return ubm, list(means[owner] + noise)


def textbook_statistics(
    utterances: list[np.ndarray], weights: np.ndarray, means: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Frame by frame: log densities of all Gaussians, soft-max, sums."""
    constant = np.log(weights) - 0.5 * np.log(2 * math.pi * variances).sum(1)
    gamma = np.zeros((len(utterances), len(weights)))
    first = np.zeros((len(utterances), *means.shape))
    for n, frames in enumerate(utterances):
        for x in frames:
            scores = constant - 0.5 * ((x - means) ** 2 / variances).sum(1)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            gamma[n] += shares
            first[n] += shares[:, None] * x
    return gamma, first


def textbook_extraction(
    gamma: np.ndarray, first: np.ndarray, means: np.ndarray, t: np.ndarray, variances: np.ndarray
) -> np.ndarray:
    """Utterance by utterance, Gaussian by Gaussian: w = (I + T' S^-1 N T)^-1 T' S^-1 F."""
    vectors = []
    for counts, sums in zip(gamma, first, strict=True):
        precision, linear = np.eye(t.shape[2]), np.zeros(t.shape[2])
        for g in range(len(counts)):
            weighted = t[g] / variances[g][:, None]
            precision += counts[g] * t[g].T @ weighted
            linear += weighted.T @ (sums[g] - counts[g] * means[g])
        vectors.append(np.linalg.solve(precision, linear))
    return np.stack(vectors)


@pytest.mark.parametrize("size", SIZES)
def test_batched_posteriors_beat_the_textbook_loop(size: Size, record_property) -> None:
    ubm, utterances = example(size)
    plain = [u.numpy() for u in utterances]
    arguments = (ubm.weights.numpy(), ubm.means.numpy(), ubm.variances.numpy())
    cfg = StatisticsSettings(selected=GAUSSIANS, minimum_posterior=0.0)
    found = bw.baum_welch(utterances, ubm, cfg)
    gamma, first = textbook_statistics(plain, *arguments)
    np.testing.assert_allclose(found.gamma.numpy(), gamma, atol=1e-8)
    np.testing.assert_allclose(found.first.numpy(), first, atol=1e-7)
    fast = best_of(5, lambda: bw.baum_welch(utterances, ubm, cfg))
    slow = best_of(2, lambda: textbook_statistics(plain, *arguments))
    record_property("ratio", slow / fast)
    print(f"posteriors: {fast * 1e3:.1f} ms against {slow * 1e3:.1f} ms, {slow / fast:.1f} x")
    assert slow / fast >= size.posteriors


@pytest.mark.parametrize("size", SIZES)
def test_batched_extraction_beats_the_textbook_loop(size: Size, record_property) -> None:
    ubm, utterances = example(size)
    cfg = tv.TotalVariabilitySettings(dimensions=DIMENSIONS, formulation="centred")
    model = tv.initialise(ubm, cfg, torch.Generator().manual_seed(1))
    stats = bw.baum_welch(utterances, ubm, StatisticsSettings())
    arguments = [
        x.numpy()
        for x in (stats.gamma, stats.first, model.means, model.matrices, model.covariances)
    ]
    expected = textbook_extraction(*arguments)
    np.testing.assert_allclose(tv.extract(stats, model).numpy(), expected, atol=1e-8)
    fast = best_of(5, lambda: tv.extract(stats, model))
    slow = best_of(2, lambda: textbook_extraction(*arguments))
    record_property("ratio", slow / fast)
    print(f"extraction: {fast * 1e3:.1f} ms against {slow * 1e3:.1f} ms, {slow / fast:.1f} x")
    assert slow / fast >= size.extraction

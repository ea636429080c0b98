"""Diagonal and full-covariance UBM: EM, growth, floors, selection, merging."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.ivector import diagonal_gmm, full_gmm
from goldcrest.kernels.ivector.diagonal_gmm import DiagonalGmm, DiagonalGmmSettings
from goldcrest.kernels.ivector.full_gmm import FullGmm, FullGmmSettings
from goldcrest.kernels.ivector.records import merge, merge_all


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(frames: int = 600, dimensions: int = 4, seed: int = 0) -> torch.Tensor:
    """Three correlated Gaussian clouds of different size."""
    g = generator(seed)
    centres = 4 * torch.randn(3, dimensions, generator=g, dtype=torch.float64)
    mixing = torch.randn(3, dimensions, dimensions, generator=g, dtype=torch.float64)
    cloud = torch.randint(0, 3, (frames,), generator=g)
    noise = torch.randn(frames, dimensions, generator=g, dtype=torch.float64)
    return centres[cloud] + (mixing[cloud] @ noise[..., None])[..., 0]


def small_ubm(gaussians: int = 5) -> tuple[torch.Tensor, DiagonalGmm]:
    frames = blobs()
    cfg = DiagonalGmmSettings(gaussians=gaussians, iterations=8)
    return frames, diagonal_gmm.train(frames, cfg, generator())[0]


def test_log_likelihoods_equal_the_plain_twin_and_torch_distributions() -> None:
    frames, gmm = small_ubm()
    found = diagonal_gmm.log_likelihoods(frames[:50], gmm)
    torch.testing.assert_close(found, diagonal_gmm.log_likelihoods_reference(frames[:50], gmm))
    normal = torch.distributions.Normal(gmm.means, gmm.variances.sqrt())
    expected = normal.log_prob(frames[:50, None]).sum(-1) + gmm.weights.log()
    torch.testing.assert_close(found, expected)


def test_log_likelihoods_survive_a_large_common_offset_in_float32() -> None:
    frames, gmm = small_ubm()
    far = dataclasses.replace(gmm, means=gmm.means + 300)
    single = DiagonalGmm(**{k: v.float() for k, v in far.to_tensors().items()})
    found = diagonal_gmm.log_likelihoods((frames[:50] + 300).float(), single)
    expected = diagonal_gmm.log_likelihoods(frames[:50], gmm)
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1_000))
def test_growing_mixture_has_the_asked_size_and_unit_weights(gaussians: int, seed: int) -> None:
    cfg = DiagonalGmmSettings(gaussians=gaussians, iterations=6)
    gmm, history = diagonal_gmm.train(blobs(200, seed=seed), cfg, generator(seed))
    assert gmm.means.shape == (gaussians, 4)
    assert float(gmm.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert bool((gmm.variances >= gmm.floor).all())
    assert len(history) == 6


def test_diagonal_em_never_lowers_the_likelihood() -> None:
    frames, gmm = small_ubm()
    cfg = DiagonalGmmSettings(
        gaussians=5, minimum_weight=0.0, variance_floor=1e-12, minimum_count=0.0
    )
    values = []
    for _ in range(12):
        statistics = diagonal_gmm.accumulate(frames, gmm)
        values.append(float(statistics.log_likelihood))
        gmm = diagonal_gmm.update(statistics, gmm, cfg)
    assert all(after >= before - 1e-8 for before, after in itertools.pairwise(values))


def test_full_em_never_lowers_the_likelihood_and_beats_the_diagonal() -> None:
    frames, diagonal = small_ubm()
    gmm = full_gmm.from_diagonal(diagonal)
    cfg = FullGmmSettings(
        selected=5,
        minimum_weight=0.0,
        minimum_count=0.0,
        variance_floor=1e-12,
        condition_limit=1e15,
    )
    values = []
    for _ in range(8):
        statistics = full_gmm.accumulate(frames, gmm, cfg)
        values.append(float(statistics.log_likelihood))
        gmm = full_gmm.update(statistics, gmm, cfg)
    assert all(after >= before - 1e-8 for before, after in itertools.pairwise(values))
    assert values[-1] > values[0] + 1.0


def test_one_gaussian_is_the_sample_mean_and_covariance() -> None:
    frames = blobs()
    cfg = DiagonalGmmSettings(gaussians=1, iterations=2)
    diagonal, _ = diagonal_gmm.train(frames, cfg, generator())
    torch.testing.assert_close(diagonal.means[0], frames.mean(0))
    torch.testing.assert_close(diagonal.variances[0], frames.var(0, unbiased=False))
    full = full_gmm.from_diagonal(diagonal)
    full_cfg = FullGmmSettings(selected=1)
    full = full_gmm.update(full_gmm.accumulate(frames, full, full_cfg), full, full_cfg)
    torch.testing.assert_close(full.covariances[0], frames.T.cov(correction=0))


def test_full_log_likelihoods_equal_torch_distributions() -> None:
    frames, diagonal = small_ubm()
    gmm = full_gmm.from_diagonal(diagonal)
    cfg = FullGmmSettings(selected=5, minimum_count=0.0)
    gmm = full_gmm.update(full_gmm.accumulate(frames, gmm, cfg), gmm, cfg)
    normal = torch.distributions.MultivariateNormal(gmm.means, gmm.covariances)
    expected = normal.log_prob(frames[:, None]) + gmm.weights.log()
    torch.testing.assert_close(full_gmm.log_likelihoods(frames, gmm), expected)


def test_selecting_all_gaussians_is_exact_and_few_are_the_best() -> None:
    frames, diagonal = small_ubm()
    exact = diagonal_gmm.accumulate(frames, diagonal)
    chosen = diagonal_gmm.accumulate(frames, diagonal, selected=5)
    for name, value in exact.to_tensors().items():
        torch.testing.assert_close(chosen.to_tensors()[name], value)
    pruned = diagonal_gmm.accumulate(frames, diagonal, selected=2)
    assert float(pruned.log_likelihood) <= float(exact.log_likelihood)
    assert float(pruned.occupancy.sum()) == pytest.approx(600.0)
    gmm = full_gmm.from_diagonal(diagonal)
    indices, scores = full_gmm.select(frames, gmm, 5)
    expected = full_gmm.log_likelihoods(frames, gmm).gather(1, indices)
    torch.testing.assert_close(scores, expected)


def test_merged_shards_equal_one_pass() -> None:
    frames, diagonal = small_ubm()
    gmm, cfg = full_gmm.from_diagonal(diagonal), FullGmmSettings(selected=3)
    for whole, parts in (
        (
            diagonal_gmm.accumulate(frames, diagonal),
            [diagonal_gmm.accumulate(f, diagonal) for f in frames.split(170)],
        ),
        (
            full_gmm.accumulate(frames, gmm, cfg),
            [full_gmm.accumulate(f, gmm, cfg) for f in frames.split(170)],
        ),
    ):
        merged = merge_all(parts).to_tensors()
        for name, value in whole.to_tensors().items():
            torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-9)


def test_blocks_of_any_size_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, diagonal = small_ubm()
    gmm, cfg = full_gmm.from_diagonal(diagonal), FullGmmSettings(selected=3)
    cases = (
        (diagonal_gmm, lambda: diagonal_gmm.accumulate(frames, diagonal)),
        (full_gmm, lambda: full_gmm.accumulate(frames, gmm, cfg)),
    )
    for module, call in cases:
        whole = call().to_tensors()
        monkeypatch.setattr(module, "_BLOCK_VALUES", 5 * 37)
        for name, value in call().to_tensors().items():
            torch.testing.assert_close(value, whole[name])


def test_merging_what_does_not_belong_together_is_refused() -> None:
    frames, five = small_ubm()
    _, four = small_ubm(4)
    a, b = diagonal_gmm.accumulate(frames, five), diagonal_gmm.accumulate(frames, four)
    with pytest.raises(ValueError, match="different models"):
        merge(a, b)
    with pytest.raises(ValueError, match="missing"):
        DiagonalGmm.from_tensors({"weights": five.weights})


def test_models_survive_a_round_trip_through_tensors() -> None:
    _, diagonal = small_ubm()
    again = DiagonalGmm.from_tensors(diagonal.to_tensors())
    assert torch.equal(again.means, diagonal.means)
    gmm = full_gmm.from_diagonal(diagonal)
    assert torch.equal(FullGmm.from_tensors(gmm.to_tensors()).covariances, gmm.covariances)
    assert torch.equal(full_gmm.to_diagonal(gmm).variances, diagonal.variances)


def test_covariance_floors_of_the_recipe() -> None:
    cfg = FullGmmSettings()  # eigenvalues >= max(1e-3, largest / 1e4)
    covariances = torch.diag_embed(torch.tensor([[1e-9, 1.0], [1e-9, 100.0]], dtype=torch.float64))
    values = torch.linalg.eigvalsh(full_gmm.floor_eigenvalues(covariances, cfg))
    torch.testing.assert_close(
        values, torch.tensor([[1e-3, 1.0], [1e-2, 100.0]], dtype=torch.float64)
    )


def test_starved_gaussians_stay_where_they_are() -> None:
    frames, gmm = small_ubm()
    lonely = dataclasses.replace(gmm, means=gmm.means.index_fill(0, torch.tensor([0]), 1e4))
    cfg = DiagonalGmmSettings(gaussians=5)
    moved = diagonal_gmm.update(diagonal_gmm.accumulate(frames, lonely), lonely, cfg)
    assert torch.equal(moved.means[0], lonely.means[0])
    assert float(moved.weights[0]) == pytest.approx(1e-4, rel=0.01)
    full = full_gmm.from_diagonal(lonely)
    statistics = full_gmm.accumulate(frames, full, FullGmmSettings())
    assert torch.equal(full_gmm.update(statistics, full, FullGmmSettings()).means[0], full.means[0])


def test_training_is_seeded() -> None:
    frames = blobs()
    cfg = DiagonalGmmSettings(gaussians=7, iterations=5)
    first, again = (diagonal_gmm.train(frames, cfg, generator(3))[0] for _ in range(2))
    assert torch.equal(first.means, again.means)


@pytest.mark.parametrize(
    "call",
    [
        lambda: DiagonalGmmSettings(gaussians=0),
        lambda: DiagonalGmmSettings(gaussians=4, initial_gaussians=5),
        lambda: DiagonalGmmSettings(gaussians=4, minimum_weight=0.3),
        lambda: DiagonalGmmSettings(iterations=0),
        lambda: DiagonalGmmSettings(variance_floor=0.0),
        lambda: FullGmmSettings(selected=0),
        lambda: FullGmmSettings(minimum_weight=1.0),
        lambda: FullGmmSettings(condition_limit=0.5),
        lambda: diagonal_gmm.train(blobs(5), DiagonalGmmSettings(gaussians=8), generator()),
        lambda: diagonal_gmm.train(
            blobs().fill_(float("nan")), DiagonalGmmSettings(gaussians=2), generator()
        ),
        lambda: diagonal_gmm.log_likelihoods(torch.zeros(3, 9), small_ubm()[1]),
        lambda: full_gmm.log_likelihoods(torch.zeros(3, 9), full_gmm.from_diagonal(small_ubm()[1])),
        lambda: diagonal_gmm.select(blobs(), small_ubm()[1], 0),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must|need|finite|trained on"):
        call()

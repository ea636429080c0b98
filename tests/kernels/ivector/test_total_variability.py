"""Baum-Welch statistics and the total-variability model: spec section 11's properties."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.ivector import diagonal_gmm, full_gmm
from goldcrest.kernels.ivector import statistics as bw
from goldcrest.kernels.ivector import total_variability as tv
from goldcrest.kernels.ivector.diagonal_gmm import DiagonalGmm
from goldcrest.kernels.ivector.full_gmm import FullGmm
from goldcrest.kernels.ivector.records import merge_all
from goldcrest.kernels.ivector.statistics import BaumWelch, StatisticsSettings
from goldcrest.kernels.ivector.total_variability import (
    TotalVariability,
    TotalVariabilitySettings,
    TotalVariabilitySums,
)

G, D, R = 4, 3, 3

EVERYTHING = StatisticsSettings(selected=G, minimum_posterior=0.0, second_order="full")
UNFLOORED = TotalVariabilitySettings(dimensions=R, minimum_count=0.0, covariance_floor=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make_ubm(*, full: bool) -> FullGmm | DiagonalGmm:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    means = 3 * randn(G, D, seed=1)
    if not full:
        variances = 0.5 + randn(G, D, seed=2).abs()
        return DiagonalGmm(
            weights=weights, means=means, variances=variances, floor=torch.zeros(D).double()
        )
    mix = randn(G, D, D, seed=2)
    covariances = mix @ mix.mT + 0.5 * torch.eye(D).double()
    return FullGmm(weights=weights, means=means, covariances=covariances)


def make_utterances(count: int = 30, frames: int = 40) -> list[torch.Tensor]:
    """Utterances around a common cloud, each shifted by an offset of its own."""
    return [
        3 * randn(frames + n % 5, D, seed=10 + n) + randn(D, seed=500 + n) for n in range(count)
    ]


def make_model(formulation: str, *, full: bool = True) -> TotalVariability:
    cfg = dataclasses.replace(UNFLOORED, formulation=formulation)
    return tv.initialise(make_ubm(full=full), cfg, generator(5))


def statistics(*, full: bool = True, count: int = 30) -> BaumWelch:
    kind = dataclasses.replace(EVERYTHING, second_order="full" if full else "diagonal")
    return bw.baum_welch(make_utterances(count), make_ubm(full=full), kind)


# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("second_order", ["none", "diagonal", "full"])
def test_baum_welch_equals_the_plain_twin(full: bool, second_order: str) -> None:
    cfg = StatisticsSettings(selected=3, second_order=second_order, scale=0.3, maximum_count=10.0)
    utterances = [*make_utterances(3, 20), torch.zeros(0, D), randn(50, D)]
    found = bw.baum_welch(utterances, make_ubm(full=full), cfg).to_tensors()
    expected = bw.baum_welch_reference(utterances, make_ubm(full=full), cfg).to_tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert float(found["gamma"].sum(1).max()) == pytest.approx(10.0)  # 50 frames x 0.3, capped
    assert not found["gamma"][3].any()  # no frames, no statistics


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.floats(0.0, 0.6), st.booleans())
def test_posteriors_sum_to_one(selected: int, minimum: float, full: bool) -> None:
    cfg = StatisticsSettings(selected=selected, minimum_posterior=minimum)
    indices, shares = bw.posteriors(4 * randn(60, D), make_ubm(full=full), cfg)
    assert indices.shape == (60, min(selected, G))
    torch.testing.assert_close(shares.sum(1), torch.ones(60).double())
    assert bool(((shares == 0) | (shares >= minimum)).all())


@pytest.mark.parametrize("full", [False, True])
def test_posteriors_with_all_gaussians_are_exact(full: bool) -> None:
    frames, ubm = 4 * randn(60, D), make_ubm(full=full)
    indices, shares = bw.posteriors(frames, ubm, EVERYTHING)
    family = full_gmm if full else diagonal_gmm
    expected = family.log_likelihoods(frames, ubm).softmax(1).gather(1, indices)
    torch.testing.assert_close(shares, expected)


def test_concatenated_batches_equal_one_batch() -> None:
    utterances, ubm = make_utterances(9), make_ubm(full=True)
    whole = bw.baum_welch(utterances, ubm, EVERYTHING).to_tensors()
    parts = [bw.baum_welch(utterances[i : i + 4], ubm, EVERYTHING) for i in (0, 4, 8)]
    for name, value in bw.concatenate(parts).to_tensors().items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("second_order", ["diagonal", "full"])
def test_blocks_of_any_size_equal_one_block(
    second_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances, ubm = [*make_utterances(4), torch.zeros(0, D)], make_ubm(full=True)
    cfg = dataclasses.replace(EVERYTHING, second_order=second_order)
    whole = bw.baum_welch(utterances, ubm, cfg).to_tensors()
    for size in (1, 7, 41):  # frames per block: utterances of 40 to 43 frames straddle them
        monkeypatch.setattr(bw, "_BLOCK_VALUES", size * G)
        for name, value in bw.baum_welch(utterances, ubm, cfg).to_tensors().items():
            torch.testing.assert_close(value, whole[name])


def test_scaling_the_statistics_equals_the_setting() -> None:
    utterances, ubm = make_utterances(3), make_ubm(full=True)
    quarter = dataclasses.replace(EVERYTHING, scale=0.25)
    expected = bw.baum_welch(utterances, ubm, quarter).to_tensors()
    found = bw.scale(bw.baum_welch(utterances, ubm, EVERYTHING), 0.25).to_tensors()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# --- extraction ------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_posterior_equals_a_dense_solve_of_the_stacked_system(formulation: str, full: bool) -> None:
    model, stats = make_model(formulation, full=full), statistics(full=full, count=3)
    covariances = model.covariances if full else torch.diag_embed(model.covariances)
    tall = model.matrices.reshape(G * D, R)
    inverse = torch.block_diag(*torch.linalg.inv(covariances))
    mean, covariance = tv.posterior(stats, model)
    for n in range(3):
        counts = torch.diag(stats.gamma[n].repeat_interleave(D))
        centred = (stats.first[n] - stats.gamma[n][:, None] * model.means).reshape(-1)
        precision = torch.eye(R).double() + tall.T @ inverse @ counts @ tall
        linear = tall.T @ inverse @ centred
        linear[0] += model.offset
        torch.testing.assert_close(covariance[n], torch.linalg.inv(precision))
        torch.testing.assert_close(mean[n], torch.linalg.solve(precision, linear))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_extract_equals_the_plain_twin(formulation: str, full: bool) -> None:
    model, stats = make_model(formulation, full=full), statistics(full=full)
    torch.testing.assert_close(tv.extract(stats, model), tv.extract_reference(stats, model))
    torch.testing.assert_close(
        tv.extract(stats, model, scale=0.2), tv.extract_reference(bw.scale(stats, 0.2), model)
    )


@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_no_frames_give_the_zero_vector(formulation: str) -> None:
    empty = bw.baum_welch([torch.zeros(0, D)], make_ubm(full=True), EVERYTHING)
    found = tv.extract(empty, make_model(formulation))
    torch.testing.assert_close(found, torch.zeros(1, R).double(), atol=1e-10, rtol=0)


def test_duplicating_frames_tends_to_the_ml_solution_and_shrinks_the_covariance() -> None:
    model, stats = make_model("centred"), statistics(count=1)
    tall = model.matrices.reshape(G * D, R)
    inverse = torch.block_diag(*torch.linalg.inv(model.covariances))
    counts = torch.diag(stats.gamma[0].repeat_interleave(D))
    centred = (stats.first[0] - stats.gamma[0][:, None] * model.means).reshape(-1)
    precision = tall.T @ inverse @ counts @ tall
    ml = torch.linalg.solve(precision, tall.T @ inverse @ centred)
    mean, covariance = tv.posterior(bw.scale(stats, 1e7), model)
    torch.testing.assert_close(mean[0], ml, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(covariance[0] * 1e7, torch.linalg.inv(precision), rtol=1e-4, atol=0)


def test_formulations_agree_when_column_zero_is_frozen() -> None:
    # With a huge offset coordinate 0 of w has no freedom left: w_0 = p up to 1 / p.
    centred, stats = make_model("centred"), statistics()
    offset = 1e6
    column = (centred.means / offset)[:, :, None]
    augmented = dataclasses.replace(
        centred,
        means=torch.zeros_like(centred.means),
        matrices=torch.cat([column, centred.matrices], dim=2),
        offset=torch.tensor(offset, dtype=torch.float64),
    )
    found = tv.extract(stats, augmented)[:, 1:]
    torch.testing.assert_close(found, tv.extract(stats, centred), rtol=1e-4, atol=1e-4)


def test_invariant_to_invertible_maps_of_the_features() -> None:
    ubm, model = make_ubm(full=True), make_model("centred")
    a = randn(D, D, seed=77) + 2 * torch.eye(D).double()
    mapped_ubm = FullGmm(
        weights=ubm.weights, means=ubm.means @ a.T, covariances=a @ ubm.covariances @ a.T
    )
    mapped = dataclasses.replace(
        model,
        means=model.means @ a.T,
        matrices=a @ model.matrices,
        covariances=a @ model.covariances @ a.T,
    )
    utterances = make_utterances(5)
    expected = tv.extract(bw.baum_welch(utterances, ubm, EVERYTHING), model)
    moved = bw.baum_welch([u @ a.T for u in utterances], mapped_ubm, EVERYTHING)
    torch.testing.assert_close(tv.extract(moved, mapped), expected)


def test_permuting_gaussians_changes_nothing() -> None:
    ubm, model, order = make_ubm(full=True), make_model("augmented"), torch.tensor([2, 0, 3, 1])
    shuffled_ubm = FullGmm(**{k: v[order] for k, v in ubm.to_tensors().items()})
    tensors = {k: v if k == "offset" else v[order] for k, v in model.to_tensors().items()}
    shuffled = TotalVariability.from_tensors(tensors)
    utterances = make_utterances(5)
    expected = tv.extract(bw.baum_welch(utterances, ubm, EVERYTHING), model)
    found = tv.extract(bw.baum_welch(utterances, shuffled_ubm, EVERYTHING), shuffled)
    torch.testing.assert_close(found, expected)


# --- training --------------------------------------------------------------------------------


def test_objective_equals_the_marginal_likelihood_of_the_frames() -> None:
    # One Gaussian: all frames of an utterance are jointly normal, so log p is known in full.
    full = make_ubm(full=True)
    ubm = FullGmm(
        weights=torch.ones(1).double(), means=full.means[:1], covariances=full.covariances[:1]
    )
    for formulation in ("augmented", "centred"):
        cfg = dataclasses.replace(UNFLOORED, formulation=formulation)
        model = tv.initialise(ubm, cfg, generator(3))
        utterances = make_utterances(3, 6)
        stats = bw.baum_welch(utterances, ubm, EVERYTHING)
        expected = 0.0
        for frames in utterances:
            count = frames.shape[0]
            prior = torch.zeros(R).double()
            prior[0] = model.offset
            mean = (model.means[0] + model.matrices[0] @ prior).repeat(count)
            tall = model.matrices[0].repeat(count, 1)
            noise = torch.block_diag(*[model.covariances[0]] * count)
            density = torch.distributions.MultivariateNormal(mean, tall @ tall.T + noise)
            expected += float(density.log_prob(frames.reshape(-1)))
        assert tv.objective(tv.e_step(stats, model), model) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("minimum_divergence", [False, True])
@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_em_never_lowers_the_objective(
    formulation: str, minimum_divergence: bool, full: bool
) -> None:
    cfg = dataclasses.replace(
        UNFLOORED, formulation=formulation, minimum_divergence=minimum_divergence, iterations=10
    )
    _, history = tv.train(statistics(full=full), make_ubm(full=full), cfg, generator(8))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.01


@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_objective_without_second_order_differs_by_a_constant(formulation: str) -> None:
    cfg = dataclasses.replace(UNFLOORED, formulation=formulation, update_covariances=False)
    stats = statistics()
    bare = dataclasses.replace(stats, second=None)
    _, whole = tv.train(stats, make_ubm(full=True), cfg, generator(1))
    _, partial = tv.train(bare, make_ubm(full=True), cfg, generator(1))
    gaps = [a - b for a, b in zip(whole, partial, strict=True)]
    assert max(gaps) - min(gaps) < 1e-9


@pytest.mark.parametrize("diagonalise", [False, True])
@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_minimum_divergence_standardises_the_same_posteriors(
    formulation: str, diagonalise: bool
) -> None:
    cfg = dataclasses.replace(UNFLOORED, formulation=formulation, diagonalise=diagonalise)
    model, stats = make_model(formulation), statistics()
    before_means, before_covariances = tv.posterior(stats, model)
    after = tv.minimum_divergence(tv.e_step(stats, model), model, cfg)
    # The supervectors m + M w are untouched by the change of coordinates, so w' follows from w.
    tall = after.matrices.reshape(G * D, R)
    shift = (model.means - after.means).reshape(-1)
    solve = torch.linalg.pinv(tall)
    old = model.matrices.reshape(G * D, R)
    means = (before_means @ old.T + shift) @ solve.T
    change = solve @ old
    covariances = change @ before_covariances @ change.T
    prior = torch.zeros(R).double()
    prior[0] = after.offset
    torch.testing.assert_close(means.mean(0), prior, atol=1e-7, rtol=1e-7)
    spread = covariances.mean(0) + means.T.cov(correction=0)
    torch.testing.assert_close(spread, torch.eye(R).double(), atol=1e-7, rtol=0)
    if formulation == "augmented":
        assert float(after.offset) > 0


def test_diagonalising_orders_the_dimensions_by_importance() -> None:
    cfg = dataclasses.replace(UNFLOORED, formulation="centred", iterations=4)
    stats = statistics()
    model, _ = tv.train(stats, make_ubm(full=True), cfg, generator(2))
    occupancy = stats.gamma.sum(0)
    weighted = torch.linalg.solve(model.covariances, model.matrices)
    u = torch.einsum("g,gdr,gds->rs", occupancy, model.matrices, weighted) / occupancy.sum()
    torch.testing.assert_close(u, torch.diag(u.diagonal()), atol=1e-8, rtol=0)
    assert bool((u.diagonal().diff() <= 1e-12).all())


@pytest.mark.parametrize("formulation", ["augmented", "centred"])
def test_merged_shards_equal_one_pass(formulation: str) -> None:
    model, utterances, ubm = make_model(formulation), make_utterances(), make_ubm(full=True)
    whole = tv.e_step(bw.baum_welch(utterances, ubm, EVERYTHING), model).to_tensors()
    shards = [bw.baum_welch(utterances[i::3], ubm, EVERYTHING) for i in range(3)]
    merged = merge_all([tv.e_step(shard, model) for shard in shards])
    for name, value in merged.to_tensors().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9)
    again = TotalVariabilitySums.from_tensors(merged.to_tensors())
    assert torch.equal(again.outer, merged.outer)


def test_small_blocks_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stats = make_model("augmented"), statistics()
    expected = tv.e_step(stats, model).to_tensors()
    monkeypatch.setattr(tv, "_BLOCK_VALUES", 7 * R * R)
    for name, value in tv.e_step(stats, model).to_tensors().items():
        torch.testing.assert_close(value, expected[name])


def test_training_finds_a_known_subspace() -> None:
    # 300 utterances drawn from a known model with two directions of variability.
    g, rank = generator(42), 2
    ubm = make_ubm(full=False)
    truth = 1.5 * torch.randn(G, D, rank, generator=g, dtype=torch.float64)
    utterances = []
    for _ in range(300):
        owner = torch.multinomial(ubm.weights, 150, replacement=True, generator=g)
        shift = truth @ torch.randn(rank, generator=g, dtype=torch.float64)
        noise = torch.randn(150, D, generator=g, dtype=torch.float64)
        utterances.append((owner, (ubm.means + shift)[owner] + noise * ubm.variances[owner].sqrt()))
    # Statistics by the true owners: this is about the subspace, not about the alignment.
    shares = [torch.nn.functional.one_hot(owner, G).double() for owner, _ in utterances]
    pairs = [(p, x) for p, (_, x) in zip(shares, utterances, strict=True)]
    stats = BaumWelch(
        gamma=torch.stack([p.sum(0) for p, _ in pairs]),
        first=torch.stack([p.T @ x for p, x in pairs]),
        second=torch.stack([p.T @ x.square() for p, x in pairs]).sum(0),
    )

    def largest_angle(model: TotalVariability) -> float:
        a = torch.linalg.qr(truth.reshape(-1, rank)).Q
        b = torch.linalg.qr(model.matrices.reshape(-1, rank)).Q
        return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(a.T @ b)[-1]))))

    cfg = TotalVariabilitySettings(dimensions=rank, formulation="centred", iterations=15)
    start = tv.initialise(ubm, cfg, generator(6))
    trained, _ = tv.train(stats, ubm, cfg, generator(6))
    assert largest_angle(start) > 45
    assert largest_angle(trained) < 6


def test_covariances_are_floored_relative_to_their_mean() -> None:
    stats, model = statistics(), make_model("centred")
    sums = tv.e_step(stats, model)
    cfg = dataclasses.replace(UNFLOORED, covariance_floor=1.0)
    found = tv.m_step(sums, model, cfg).covariances
    free = tv.m_step(sums, model, UNFLOORED).covariances
    mean = torch.einsum("g,gij->ij", sums.occupancy / sums.occupancy.sum(), free)
    assert float(torch.linalg.eigvalsh(found - mean).min()) > -1e-9


def test_starved_gaussians_are_not_updated() -> None:
    model, sums = make_model("centred"), tv.e_step(statistics(), make_model("centred"))
    limit = float(sums.occupancy.sort().values[1])
    cfg = dataclasses.replace(UNFLOORED, minimum_count=limit)
    found = tv.m_step(sums, model, cfg)
    lowest = int(sums.occupancy.argmin())
    assert torch.equal(found.matrices[lowest], model.matrices[lowest])
    others = [g for g in range(G) if g != lowest]
    assert not torch.isclose(found.matrices[others], model.matrices[others]).all()


def test_model_survives_a_round_trip_through_tensors() -> None:
    model, stats = make_model("augmented"), statistics()
    again = TotalVariability.from_tensors(model.to_tensors())
    assert float(again.offset) == 100.0  # the offset travels with the model
    assert torch.equal(tv.extract(stats, again), tv.extract(stats, model))


@pytest.mark.parametrize(
    "call",
    [
        lambda: TotalVariabilitySettings(dimensions=1),
        lambda: TotalVariabilitySettings(formulation="joint"),
        lambda: TotalVariabilitySettings(offset=0.0),
        lambda: TotalVariabilitySettings(covariance_floor=2.0),
        lambda: StatisticsSettings(selected=0),
        lambda: StatisticsSettings(minimum_posterior=1.0),
        lambda: StatisticsSettings(second_order="third"),
        lambda: StatisticsSettings(scale=0.0),
        lambda: bw.scale(statistics(count=1), 0.0),
        lambda: tv.extract(statistics(count=1), make_model("centred"), scale=0.0),
        lambda: bw.baum_welch([torch.zeros(2, 9)], make_ubm(full=True), EVERYTHING),
        lambda: tv.extract(
            BaumWelch(gamma=torch.zeros(1, 2), first=torch.zeros(1, 2, D)), make_model("centred")
        ),
        lambda: tv.m_step(
            tv.e_step(dataclasses.replace(statistics(), second=None), make_model("centred")),
            make_model("centred"),
            UNFLOORED,
        ),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must|choose|needs|another UBM|UBM has"):
        call()

"""Error rates against hand-worked goldens, naive loops and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.metrics.verification import (
    bootstrap_eer,
    det_curve,
    equal_error_rate,
    far_at_frr,
    min_dcf,
)

TEN = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.2]
FIVE = [0.5, 0.4, 0.3, 0.58, 0.1]


def trial_list(targets: list[float], nontargets: list[float]) -> tuple[np.ndarray, np.ndarray]:
    scores = np.array(targets + nontargets)
    return scores, np.array([1] * len(targets) + [0] * len(nontargets))


def random_list(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random(count) < 0.4
    # Rounded to one decimal: many ties, across the two kinds too.
    return np.round(rng.normal(size=count) + 1.5 * target, 1), target


def naive_rates(scores: np.ndarray, target: np.ndarray) -> list[tuple[float, float]]:
    """(FRR, FAR) at every threshold, straight from the definition."""
    points = []
    for threshold in [*sorted(set(scores.tolist())), np.inf]:
        points.append(
            (
                float(np.mean(scores[target.astype(bool)] < threshold)),
                float(np.mean(scores[~target.astype(bool)] >= threshold)),
            )
        )
    return points


def naive_eer(scores: np.ndarray, target: np.ndarray) -> float:
    points = naive_rates(scores, target)
    after = next(i for i, (frr, far) in enumerate(points) if frr >= far)
    (frr0, far0), (frr1, far1) = points[after - 1], points[after]
    share = (far0 - frr0) / ((far0 - frr0) + (frr1 - far1))
    return frr0 + share * (frr1 - frr0)


@pytest.mark.parametrize(
    ("targets", "nontargets", "eer"),
    [
        # Specification, section 7 (golden values), each worked by hand from the definition.
        ([0.9, 0.8, 0.3], [0.7, 0.2, 0.1], 1 / 3),
        ([0.9, 0.8], [0.2, 0.1], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.5, 0.5, 0.5], [0.5, 0.5], 0.5),
        (TEN, FIVE, 0.2),
    ],
)
def test_eer_golden(targets: list[float], nontargets: list[float], eer: float) -> None:
    assert equal_error_rate(*trial_list(targets, nontargets)) == pytest.approx(eer, abs=1e-12)


def test_costs_golden() -> None:
    # Specification, section 7.
    assert min_dcf(*trial_list([0.9, 0.8, 0.3], [0.7, 0.2, 0.1]), 0.05) == pytest.approx(1 / 3)
    ten = trial_list(TEN, FIVE)
    assert far_at_frr(*ten) == pytest.approx(0.2)
    assert min_dcf(*ten, 0.05) == pytest.approx(0.2)
    assert min_dcf(*ten, 0.01) == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(5))
def test_rates_and_costs_against_the_definition(seed: int) -> None:
    scores, target = random_list(seed)
    points = naive_rates(scores, target)
    curve = det_curve(scores, target)
    np.testing.assert_allclose(np.stack([curve.frr, curve.far], 1), points, atol=1e-12)
    assert equal_error_rate(scores, target) == pytest.approx(naive_eer(scores, target))
    cost = min((2 * 0.1 * frr + 3 * 0.9 * far) / (2 * 0.1) for frr, far in points)
    found = min_dcf(scores, target, 0.1, cost_miss=2, cost_false_alarm=3)
    assert found == pytest.approx(cost)
    assert far_at_frr(scores, target) == min(far for frr, far in points if frr <= 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_roc_max_is_the_larger_rate_at_the_closest_point(seed: int) -> None:
    # Independent: over all thresholds by the definition. scikit-learn leaves collinear points
    # out, so its answer may lie above this one, by a step of the curve at most.
    scores, target = random_list(seed)
    closest = min(naive_rates(scores, target), key=lambda point: abs(point[0] - point[1]))
    found = equal_error_rate(scores, target, "roc_max")
    assert max(closest) - 1e-12 <= found <= max(closest) + 0.05


def kaldi_loop(targets: list[float], nontargets: list[float]) -> float:
    """The rank search written as the loop that its description gives."""
    targets, nontargets = sorted(targets), sorted(nontargets)
    position = 0
    while position + 1 < len(targets):
        above = int(len(nontargets) * position / len(targets))
        rival = max(len(nontargets) - 1 - above, 0)
        if nontargets[rival] < targets[position]:
            break
        position += 1
    return position / len(targets)


@pytest.mark.parametrize("seed", range(5))
def test_kaldi_rank_search(seed: int) -> None:
    scores, target = random_list(seed)
    expected = kaldi_loop(scores[target].tolist(), scores[~target].tolist())
    assert equal_error_rate(scores, target, "kaldi") == pytest.approx(expected)


def test_kaldi_golden() -> None:
    # By hand: target .2 (n=0) meets .58, .55 (n=1) meets the non-target with 0 above it, .58;
    # .6 (n=2, one above) meets .5 < .6: two of ten targets are missed.
    assert equal_error_rate(*trial_list(TEN, FIVE), "kaldi") == pytest.approx(0.2)


def test_methods_agree_on_long_lists() -> None:
    rng = np.random.default_rng(0)
    target = rng.random(20_000) < 0.5
    scores = rng.normal(size=20_000) + 2 * target
    # Two unit normals two apart: EER = Phi(-1) = 0.1587.
    for method in ("interp", "roc_max", "kaldi"):
        assert equal_error_rate(scores, target, method) == pytest.approx(0.1587, abs=0.006)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_eer_sees_only_the_order(seed: int) -> None:
    scores, target = random_list(seed, count=40)
    if target.all() or not target.any():
        return
    eer = equal_error_rate(scores, target)
    assert 0 <= eer <= 1
    assert equal_error_rate(np.exp(3 * scores) - 7, target) == eer  # strictly increasing map
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    assert equal_error_rate(scores[shuffled], target[shuffled]) == pytest.approx(eer, abs=1e-12)
    # Exchanging the kinds and negating the scores exchanges FRR and FAR.
    assert equal_error_rate(-scores, ~target) == pytest.approx(eer, abs=1e-9)


def test_heavy_ties_do_not_depend_on_the_order() -> None:
    scores, target = np.repeat([0.0, 1.0], 50), np.tile([0, 1], 50)
    target[75:] = 1
    rng = np.random.default_rng(1)
    values = set()
    for _ in range(10):
        order = rng.permutation(100)
        values.add(round(equal_error_rate(scores[order], target[order]), 12))
    assert len(values) == 1


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        ([0.1, 0.2], [1, 1], "no non-target trial"),
        ([0.1, 0.2], [0, 0], "no target trial"),
        ([], [], "no target trial"),
        ([0.1], [1, 0], "one length"),
        ([0.1, np.nan], [1, 0], "not finite"),
        ([0.1, 0.2], [1, 2], "labels must be"),
    ],
)
def test_bad_lists_are_refused(scores: list[float], target: list[int], message: str) -> None:
    for metric in (equal_error_rate, min_dcf, far_at_frr, det_curve, bootstrap_eer):
        with pytest.raises(ValueError, match=message):
            metric(scores, target)


def test_bad_options_are_refused() -> None:
    lists = trial_list(TEN, FIVE)
    with pytest.raises(ValueError, match="interp, roc_max, kaldi"):
        equal_error_rate(*lists, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p_target"):
        min_dcf(*lists, 1.0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_eer(*lists, level=1.0)


def test_probit_axes() -> None:
    curve = det_curve(*trial_list([2.0, 1.0], [1.5, 0.0]))
    far, frr = curve.probit()
    assert np.isfinite(far).all() and np.isfinite(frr).all()
    half = curve.far == 0.5
    assert half.any() and np.allclose(far[half], 0.0)  # the normal deviate of 50 %


def test_interval_by_trial_covers_the_known_error_rate() -> None:
    # Two unit normals two apart: EER = Phi(-1) = 0.1587. A 90 % interval misses it in about 4 of
    # 40 lists; more than 11 has probability below 0.001.
    misses, widths = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        target = np.arange(600) < 300
        scores = rng.normal(size=600) + 2 * target
        interval = bootstrap_eer(scores, target, level=0.9, replicates=200, seed=seed)
        misses += not interval.low <= 0.15866 <= interval.high
        widths.append(interval.high - interval.low)
        assert interval.unit == "trial" and interval.replicates == 200
    assert misses <= 11
    # Asymptotic deviation of the crossing, with f the normal density at 1 and n = 300 a side:
    # sqrt(p (1-p) / n / 2) = 0.0149; the 90 % interval is 2 x 1.645 deviations wide.
    assert np.mean(widths) == pytest.approx(2 * 1.645 * 0.0149, rel=0.15)


def test_speaker_weights_are_products_of_draws() -> None:
    # Three speakers, all pairs; a naive resampling that lists the trials must give the same EERs.
    rng = np.random.default_rng(3)
    names = np.repeat(["a", "b", "c", "d"], 4)
    first, second = np.triu_indices(16, 1)
    target = names[first] == names[second]
    scores = np.round(rng.normal(size=len(first)) + target, 1)
    sides = (names[first], names[second])
    interval = bootstrap_eer(scores, target, sides, replicates=60, level=0.999, seed=5)
    stream = np.random.default_rng(np.random.SeedSequence(5).spawn(2)[0])
    naive = []
    for row in stream.integers(0, 4, (60, 4)):
        drawn = np.bincount(row, minlength=4)
        copies = np.where(
            target,
            drawn[np.searchsorted(list("abcd"), sides[0])],
            drawn[np.searchsorted(list("abcd"), sides[0])]
            * drawn[np.searchsorted(list("abcd"), sides[1])],
        )
        if copies[~target].any():
            naive.append(naive_eer(np.repeat(scores, copies), np.repeat(target, copies)))
    assert interval.unit == "speaker" and interval.replicates == len(naive)
    low, high = np.quantile(naive, [0.0005, 0.9995])
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_interval_by_speaker_is_wider_where_speakers_repeat() -> None:
    # Every speaker has an offset of its own: trials of one speaker are far from independent.
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(12).astype(str), 20)
    first, second = np.triu_indices(240, 1)
    keep = rng.permutation(len(first))[:6000]
    first, second = first[keep], second[keep]
    offset = rng.normal(size=12)
    target = names[first] == names[second]
    effect = offset[names[first].astype(int)] + offset[names[second].astype(int)]
    scores = rng.normal(size=6000) + 2 * target + effect
    by_trial = bootstrap_eer(scores, target, replicates=200)
    by_speaker = bootstrap_eer(scores, target, (names[first], names[second]), replicates=200)
    assert by_speaker.high - by_speaker.low > 2 * (by_trial.high - by_trial.low)


@pytest.mark.parametrize("by_speaker", [True, False])
def test_block_size_changes_nothing(by_speaker: bool) -> None:
    scores, target = random_list(2, count=101)
    names = np.random.default_rng(0).integers(0, 9, (2, 101)).astype(str)
    sides = (names[0], names[1]) if by_speaker else None
    one, many = (
        bootstrap_eer(scores, target, sides, replicates=50, block_bytes=size)
        for size in (1 << 30, 1)
    )
    assert one == many


def test_too_few_speakers_for_an_interval() -> None:
    with pytest.raises(ValueError, match="too few speakers"):
        # A non-target needs both speakers, a target needs "a": drawn twice in two, never both
        # kinds when a third name never lets them meet.
        bootstrap_eer(
            [0.1, 0.9], [0, 1], (["a", "c"], ["b", "c"]), replicates=1, seed=first_useless_seed()
        )


def first_useless_seed() -> int:
    """A seed whose single replicate of speakers a, b, c does not draw all three."""
    for seed in range(100):
        stream = np.random.default_rng(np.random.SeedSequence(seed).spawn(2)[0])
        if len(set(stream.integers(0, 3, 3).tolist())) < 3:
            return seed
    raise AssertionError("no such seed")

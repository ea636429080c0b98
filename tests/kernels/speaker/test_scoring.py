"""Cosine scores, fusion and adaptive s-norm."""

from __future__ import annotations

import numpy as np
import pytest

from goldcrest.kernels.metrics.verification import equal_error_rate
from goldcrest.kernels.speaker.asnorm import Settings, asnorm_scores, cohort_statistics
from goldcrest.kernels.speaker.scoring import (
    cosine_scores,
    crop_scores,
    crop_scores_reference,
    fuse,
    length_normalise,
    z_normalise,
)


def test_cosine_scores() -> None:
    # By hand: the angle between (1, 0) and (1, 1) is 45 degrees; length plays no part.
    embeddings = np.array([[2.0, 0.0], [3.0, 3.0], [0.0, -1.0], [0.0, 0.0]])
    scores = cosine_scores(embeddings, [0, 0, 1, 0], [1, 2, 1, 3])
    np.testing.assert_allclose(scores, [np.sqrt(0.5), 0.0, 1.0, 0.0], atol=1e-12)


def test_crop_scores_equal_all_pairs_written_out() -> None:
    rng = np.random.default_rng(0)
    full, crops = rng.normal(size=(6, 9)), rng.normal(size=(6, 5, 9))
    first, second = rng.integers(0, 6, (2, 20))
    np.testing.assert_allclose(
        crop_scores(full, crops, first, second),
        crop_scores_reference(full, crops, first, second),
        atol=1e-12,
    )


def test_crops_that_are_the_utterance_give_the_cosine() -> None:
    full = np.random.default_rng(0).normal(size=(4, 7))
    crops = np.repeat(full[:, None], 5, axis=1)
    np.testing.assert_allclose(
        crop_scores(full, crops, [0, 1], [2, 3]), cosine_scores(full, [0, 1], [2, 3])
    )


def test_fusion_does_not_depend_on_a_system_s_scale() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    np.testing.assert_allclose(fuse([a, b]), fuse([7 * a + 3, 0.01 * b - 9]), atol=1e-9)
    np.testing.assert_allclose(fuse([a, b], [1, 0]), z_normalise(a))
    np.testing.assert_allclose(fuse([a, b], [2, 2]), (z_normalise(a) + z_normalise(b)) / 2)
    np.testing.assert_array_equal(z_normalise([4.0, 4.0]), [0.0, 0.0])
    np.testing.assert_allclose(z_normalise([3.0], [0.0, 2.0]), [2.0])


def test_fusion_of_independent_systems_gains() -> None:
    # Unit normals two apart, EER Phi(-1) = 15.9 %; the mean of two independent ones has its
    # distance grown by sqrt(2): Phi(-sqrt 2) = 7.9 %.
    rng = np.random.default_rng(0)
    target = rng.random(40_000) < 0.5
    a, b = (rng.normal(size=40_000) + 2 * target for _ in range(2))
    assert equal_error_rate(a, target) == pytest.approx(0.159, abs=0.006)
    assert equal_error_rate(fuse([a, 5 * b]), target) == pytest.approx(0.079, abs=0.006)


@pytest.mark.parametrize(
    ("scores", "weights"), [([], None), ([[1.0], [1.0, 2.0]], None), ([[1.0, 2.0]], [-1.0])]
)
def test_fusion_refuses_lists_that_do_not_fit(scores: list, weights: list | None) -> None:
    with pytest.raises(ValueError, match="fusion"):
        fuse(scores, weights)


def test_asnorm_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    embeddings, cohort = rng.normal(size=(5, 8)), rng.normal(size=(30, 8))
    settings = Settings(top=10, block=2)
    found = asnorm_scores(embeddings, cohort, [0, 3], [1, 4], settings)
    unit, rivals = length_normalise(embeddings), length_normalise(cohort)
    expected = []
    for a, b in ((0, 1), (3, 4)):
        sides = [np.sort(rivals @ unit[index])[-10:] for index in (a, b)]
        score = unit[a] @ unit[b]
        expected.append(np.mean([(score - side.mean()) / side.std() for side in sides]))
    np.testing.assert_allclose(found, expected)


def test_asnorm_mends_a_channel_that_raises_all_scores() -> None:
    # Half of the speakers share a strong direction: all their cosines are high, and one threshold
    # cannot serve both halves until the cohort tells what is usual.
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(60), 4)
    centres = rng.normal(size=(60, 16))
    centres[30:, 0] += 8
    embeddings = centres[speakers] + 0.7 * rng.normal(size=(240, 16))
    cohort = rng.normal(size=(200, 16)) * 1.2
    cohort[100:, 0] += 8
    half = speakers < 30
    first, second = np.triu_indices(240, 1)
    keep = half[first] == half[second]
    first, second = first[keep], second[keep]
    target = speakers[first] == speakers[second]
    plain = equal_error_rate(cosine_scores(embeddings, first, second), target)
    settings = Settings(top=50)
    normal = equal_error_rate(asnorm_scores(embeddings, cohort, first, second, settings), target)
    assert normal < 0.7 * plain


def test_asnorm_refuses_cohorts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 2 embeddings of 4"):
        cohort_statistics(np.ones((3, 4)), np.ones((1, 4)), Settings())
    with pytest.raises(ValueError, match="at least 2 embeddings of 4"):
        cohort_statistics(np.ones((3, 4)), np.ones((5, 3)), Settings())
    with pytest.raises(ValueError, match="top"):
        Settings(top=1)
    # A cohort of equal members has no deviation; the scores stay finite.
    assert np.isfinite(asnorm_scores(np.eye(3), np.ones((4, 3)), [0], [1])).all()

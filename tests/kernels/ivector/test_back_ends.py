"""Length normalisation, whitening, LDA and PLDA on vectors drawn from known models."""

from __future__ import annotations

import itertools

import pytest
import torch

from goldcrest.kernels.ivector.lda import class_covariances, fit_lda
from goldcrest.kernels.ivector.length_norm import (
    Whitening,
    fit_whitening,
    length_normalise,
    whiten,
)
from goldcrest.kernels.ivector.plda import Plda, PldaSettings, fit_plda, score, score_reference

DIMENSIONS = 4
BETWEEN = torch.diag(torch.tensor([4.0, 2.0, 0.5, 0.1])).double()
WITHIN = torch.tensor(
    [[1.0, 0.6, 0, 0], [0.6, 1.0, 0, 0], [0, 0, 2.0, 0.3], [0, 0, 0.3, 1.0]]
).double()


def draw(speakers: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the two-covariance model, 1 to 9 per speaker, with gaps in the labels."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 10, (speakers,), generator=g)
    labels = (3 * torch.arange(speakers)).repeat_interleave(counts)
    centres = torch.randn(speakers, DIMENSIONS, generator=g, dtype=torch.float64)
    centres = centres @ torch.linalg.cholesky(BETWEEN).T
    noise = torch.randn(labels.shape[0], DIMENSIONS, generator=g, dtype=torch.float64)
    vectors = 5 + centres[labels // 3] + noise @ torch.linalg.cholesky(WITHIN).T
    return vectors, labels


def test_length_normalisation_targets() -> None:
    x = torch.randn(20, 9)
    torch.testing.assert_close(length_normalise(x).norm(dim=1), torch.ones(20))
    kaldi = length_normalise(x, target="sqrt_dim")
    torch.testing.assert_close(kaldi.norm(dim=1), torch.full((20,), 3.0))
    assert not length_normalise(torch.zeros(2, 3)).any()


def test_whitening_gives_zero_mean_and_unit_covariance() -> None:
    vectors, _ = draw(200)
    found = whiten(vectors, fit_whitening(vectors))
    torch.testing.assert_close(found.mean(0), torch.zeros(4).double())
    torch.testing.assert_close(found.T.cov(correction=0), torch.eye(4).double())


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_partial_whitening_raises_the_spectrum_to_a_power(strength: float) -> None:
    vectors, _ = draw(200)
    found = whiten(vectors, fit_whitening(vectors, strength=strength))
    before = torch.linalg.eigvalsh(vectors.T.cov(correction=0))
    after = torch.linalg.eigvalsh(found.T.cov(correction=0))
    torch.testing.assert_close(after, before ** (1 - strength))


def test_whitening_survives_a_dimension_without_variance() -> None:
    vectors, _ = draw(50)
    vectors[:, 2] = 1.0
    assert torch.isfinite(whiten(vectors, fit_whitening(vectors))).all()
    again = Whitening.from_tensors(fit_whitening(vectors).to_tensors())
    assert again.transform.shape == (4, 4)


def test_class_covariances_sum_to_the_total() -> None:
    vectors, labels = draw(60)
    within, between = class_covariances(vectors, labels)
    torch.testing.assert_close(within + between, vectors.T.cov(correction=0))


def test_lda_whitens_the_within_class_covariance_and_orders_directions() -> None:
    vectors, labels = draw(300)
    projected = whiten(vectors, fit_lda(vectors, labels, 3, ridge=0.0))
    within, between = class_covariances(projected, labels)
    torch.testing.assert_close(within, torch.eye(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(between, torch.diag(between.diagonal()), atol=1e-9, rtol=0)
    assert bool((between.diagonal().diff() <= 0).all())


def test_lda_equals_scikit_learn_up_to_scale() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    vectors, labels = draw(100)
    several = torch.bincount(labels)[labels] > 1  # scikit-learn warns about lone vectors
    vectors, labels = vectors[several], labels[several]
    ours = whiten(vectors, fit_lda(vectors, labels, 2, ridge=0.0))
    theirs = LinearDiscriminantAnalysis(solver="eigen", n_components=2)
    other = torch.from_numpy(theirs.fit_transform(vectors.numpy(), labels.numpy()))
    for k in range(2):
        correlation = torch.corrcoef(torch.stack([ours[:, k], other[:, k]]))[0, 1]
        assert float(correlation.abs()) == pytest.approx(1.0, abs=1e-6)


def test_plda_em_never_lowers_the_likelihood_and_finds_the_truth() -> None:
    vectors, labels = draw(2_000)
    model, history = fit_plda(vectors, labels, PldaSettings(iterations=20, ridge=0.0))
    assert all(after >= before - 1e-10 for before, after in itertools.pairwise(history))
    torch.testing.assert_close(model.within, WITHIN, atol=0.08, rtol=0)
    torch.testing.assert_close(model.between, BETWEEN, atol=0.25, rtol=0)


def test_plda_scores_equal_the_plain_twin_and_ignore_order() -> None:
    vectors, labels = draw(100)
    model, _ = fit_plda(vectors, labels, PldaSettings(iterations=3))
    a, b = vectors[:6], vectors[6:11]
    found = score(a, b, model)
    torch.testing.assert_close(found, score_reference(a, b, model))
    torch.testing.assert_close(found, score(b, a, model).T)
    again = Plda.from_tensors(model.to_tensors())
    assert torch.equal(score(a, b, again), found)


def test_plda_separates_speakers_better_than_cosine() -> None:
    vectors, labels = draw(300)
    model, _ = fit_plda(vectors, labels, PldaSettings())
    test, names = draw(60, seed=9)
    same = names[:, None] == names[None, :]
    upper = torch.ones_like(same).triu(1)
    target, other = same & upper, ~same & upper
    unit = length_normalise(test - vectors.mean(0))

    def area(scores: torch.Tensor) -> float:
        """Share of (target, non-target) pairs in the right order."""
        ranked = scores[other].sort().values
        below = torch.searchsorted(ranked, scores[target])
        return float(below.double().mean()) / ranked.shape[0]

    assert area(score(test, test, model)) > area(unit @ unit.T) + 0.02


@pytest.mark.parametrize(
    "call",
    [
        lambda: length_normalise(torch.ones(2, 3), target="max"),
        lambda: fit_whitening(torch.ones(1, 3)),
        lambda: fit_whitening(torch.ones(3, 3), strength=2.0),
        lambda: fit_lda(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), 4),
        lambda: fit_lda(torch.randn(4, 3), torch.zeros(4), 2),
        lambda: class_covariances(torch.randn(4, 3), torch.zeros(3)),
        lambda: fit_plda(torch.randn(4, 3), torch.arange(4), PldaSettings()),
        lambda: PldaSettings(iterations=0),
        lambda: PldaSettings(ridge=-1.0),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must|needs|needed|choose|match"):
        call()

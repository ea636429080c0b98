"""Clustering metrics against the golden values of the specification and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from goldcrest.kernels.metrics import clustering

TRUTH = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
LABELS = np.array([0, 0, 1, 1, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(
    ("name", "expected"),
    # Worked by hand from the contingency table; the values of the specification, section 6b.
    [
        ("acc", 0.7),
        ("purity", 0.9),
        ("homogeneity", 0.793430),
        ("completeness", 0.648536),
        ("nmi", 0.713703),
        ("ami", 0.553541),
        ("fmi", 0.577350),
    ],
)
def test_golden_values(name: str, expected: float) -> None:
    assert clustering.supervised_metrics(LABELS, TRUTH)[name] == pytest.approx(expected, abs=1e-6)


def test_golden_mutual_information() -> None:
    table = clustering.contingency(LABELS, TRUTH)
    assert clustering.mutual_information(table) == pytest.approx(0.863966, abs=1e-6)


labellings = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(
        0, np.random.default_rng(seed).integers(1, 9, 2)[:, None], (2, 40)
    )
)


@given(labellings)
@settings(max_examples=30, deadline=None)
def test_supervised_metrics_equal_scikit_learn(pair: np.ndarray) -> None:
    labels, truth = pair
    ours = clustering.supervised_metrics(labels, truth)
    assert ours["nmi"] == pytest.approx(sk.normalized_mutual_info_score(truth, labels), abs=1e-9)
    assert ours["ami"] == pytest.approx(sk.adjusted_mutual_info_score(truth, labels), abs=1e-9)
    assert ours["homogeneity"] == pytest.approx(sk.homogeneity_score(truth, labels), abs=1e-9)
    assert ours["completeness"] == pytest.approx(sk.completeness_score(truth, labels), abs=1e-9)
    assert ours["fmi"] == pytest.approx(sk.fowlkes_mallows_score(truth, labels), abs=1e-9)


@given(labellings, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_relabelling_changes_nothing(pair: np.ndarray, seed: int) -> None:
    labels, truth = pair
    names = np.random.default_rng(seed).permutation(50)
    before = clustering.supervised_metrics(labels, truth)
    assert clustering.supervised_metrics(names[labels], truth) == pytest.approx(before)


@given(labellings)
@settings(max_examples=20, deadline=None)
def test_the_truth_scores_one(pair: np.ndarray) -> None:
    truth = pair[1]
    assert clustering.supervised_metrics(truth, truth) == pytest.approx(
        dict.fromkeys(clustering.SUPERVISED, 1.0)
    )


def test_accuracy_counts_clusters_without_partner_as_errors() -> None:
    # Four clusters of one, one class: one cluster gets the class, three are errors.
    assert clustering.accuracy(np.arange(4), np.zeros(4)) == 0.25


def test_expected_information_of_big_unequal_margins_equals_scikit_learn() -> None:
    # Margins from 1 to hundreds: cells that cannot occur must not overflow.
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(60), rng.integers(1, 90, 60))
    labels = np.where(rng.random(len(truth)) < 0.5, truth // 3, 0)
    ours = clustering.adjusted_mutual_information(labels, truth)
    assert ours == pytest.approx(sk.adjusted_mutual_info_score(truth, labels), abs=1e-9)


def _blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 200)
    labels[0] = 7  # a cluster of one, and an unused number
    return rng.normal(size=(200, 6)) + 2.0 * rng.normal(size=(8, 6))[labels], labels


def test_expected_information_in_blocks_and_of_a_collapse(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 40, 3000) * rng.integers(0, 2, 3000)
    for labels in (np.zeros(3000, int), rng.integers(0, 7, 3000)):
        whole = clustering.expected_mutual_information(clustering.contingency(labels, truth))
        monkeypatch.setattr(clustering, "_BLOCK", 100)
        cut = clustering.expected_mutual_information(clustering.contingency(labels, truth))
        monkeypatch.undo()
        assert cut == pytest.approx(whole, rel=1e-12)
    # One cluster holds no information, whatever the classes: E[I] = 0.
    one = clustering.contingency(np.zeros(3000, int), truth)
    assert clustering.expected_mutual_information(one) == pytest.approx(0, abs=1e-12)


def test_unsupervised_metrics_equal_scikit_learn() -> None:
    x, labels = _blobs()
    assert clustering.silhouette(x, labels) == pytest.approx(sk.silhouette_score(x, labels))
    assert clustering.calinski_harabasz(x, labels) == pytest.approx(
        sk.calinski_harabasz_score(x, labels)
    )
    assert clustering.davies_bouldin(x, labels) == pytest.approx(sk.davies_bouldin_score(x, labels))


def test_sampled_silhouette_is_the_mean_of_exact_values() -> None:
    x, labels = _blobs()
    rows = np.sort(np.random.default_rng(3).choice(200, 50, replace=False))
    expected = sk.silhouette_samples(x, labels)[rows].mean()
    assert clustering.silhouette(x, labels, sample=50, seed=3) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.arange(5)])
def test_metrics_on_vectors_are_none_where_undefined(labels: np.ndarray) -> None:
    x = np.random.default_rng(0).normal(size=(5, 3))
    found = clustering.clustering_metrics(labels, x=x)
    assert [found[name] for name in clustering.UNSUPERVISED] == [None] * 3


def test_one_call_gives_all_eleven_metrics() -> None:
    x, labels = _blobs()
    found = clustering.clustering_metrics(labels, labels // 2, x)
    assert set(found) == {*clustering.SUPERVISED, *clustering.UNSUPERVISED, "clusters"}
    assert len(found) == 11
    assert found["clusters"] == 6


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        clustering.supervised_metrics(np.zeros(3), np.zeros(4))

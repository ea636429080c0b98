"""k-means and agglomerative clustering against SciPy, plain twins, and blobs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cophenet, fcluster

from goldcrest.kernels.clustering import ahc, kmeans, load, methods
from goldcrest.kernels.metrics.clustering import accuracy, adjusted_mutual_information

PLAIN = [name for name in methods() if name != "cimc"]


def blobs(clusters: int = 6, each: int = 20, noise: float = 0.15, seed: int = 0):
    """Vectors (N, 8) near the unit sphere and their true cluster (N,)."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(clusters), each)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:clusters]
    x = centres[truth] + noise * rng.normal(size=(len(truth), 8))
    return torch.from_numpy(x.astype(np.float32)), truth


@pytest.mark.parametrize("norm", ["l2", "standard"])
@pytest.mark.parametrize("method", PLAIN)
def test_every_plain_method_finds_blobs_and_predicts_its_own_labels(method: str, norm: str) -> None:
    x, truth = blobs()
    module = load(method)
    found = module.fit(x, 6, module.Settings(norm=norm), seed=1)
    assert found.labels.dtype == np.int64
    assert len(np.unique(found.labels)) == 6
    assert accuracy(found.labels, truth) > 0.8
    assert adjusted_mutual_information(module.predict(found.model, x), found.labels) > 0.9


@pytest.mark.parametrize("method", PLAIN)
def test_a_seed_gives_the_same_labels_again(method: str) -> None:
    x, _ = blobs(noise=0.6)
    module = load(method)
    runs = [module.fit(x, 9, module.Settings(), seed=3).labels for _ in range(2)]
    assert np.array_equal(*runs)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize(
    ("x", "clusters", "message"),
    [
        (torch.zeros(3, 2), 4, "3 vectors cannot make 4 clusters"),
        (torch.full((3, 2), torch.nan), 2, "3 of 3 vectors hold NaN"),
        (torch.zeros(3), 2, "must be a matrix"),
        (torch.zeros(3, 2), 0, "at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(method, x, clusters, message) -> None:
    module = load(method)
    with pytest.raises(ValueError, match=message):
        module.fit(x, clusters, module.Settings(), seed=0)


@pytest.mark.parametrize("method", PLAIN)
def test_as_many_clusters_as_vectors_and_just_one(method: str) -> None:
    x, _ = blobs(each=2)
    module = load(method)
    assert len(np.unique(module.fit(x, len(x), module.Settings(), seed=0).labels)) == len(x)
    assert not module.fit(x, 1, module.Settings(), seed=0).labels.any()


def test_lloyd_step_equals_the_two_loops() -> None:
    x, _ = blobs()
    centres = x[::30].clone()
    expected = kmeans.lloyd_step_reference(x.numpy(), centres.numpy())
    found = kmeans.update(kmeans.accumulate(x, centres))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_sums_of_shards_merge_to_one_pass(sizes: list[int]) -> None:
    torch.manual_seed(0)
    x, centres = torch.randn(sum(sizes), 3), torch.randn(5, 3)
    centres[4] = 100.0  # stays empty and takes the farthest vector
    whole = kmeans.accumulate(x, centres)
    parts = [kmeans.accumulate(shard, centres) for shard in x.split(sizes)]
    merged = parts[0]
    for part in parts[1:]:
        merged = kmeans.merge(merged, part)
    torch.testing.assert_close(merged.sums, whole.sums, rtol=0, atol=1e-9)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.inertia == pytest.approx(whole.inertia)
    torch.testing.assert_close(kmeans.update(merged), kmeans.update(whole))


def test_inertia_never_rises_and_every_cluster_is_used() -> None:
    x, _ = blobs(noise=0.5)
    found = kmeans.fit(x, 12, kmeans.Settings(tolerance=0.0), seed=0)
    inertia = [row["inertia"] for row in found.history]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(inertia))
    assert len(np.unique(found.labels)) == 12


def test_seeding_spreads_over_the_blobs() -> None:
    # With well separated blobs D^2 seeding takes one centre of each almost surely.
    x, truth = blobs(noise=0.01)
    centres = kmeans.seed_centres(x, 6, torch.Generator().manual_seed(0))
    owners = truth[torch.cdist(centres, x).argmin(dim=1).numpy()]
    assert len(np.unique(owners)) == 6


def test_more_clusters_than_distinct_vectors_does_not_fail() -> None:
    x = torch.eye(3).repeat(4, 1)
    labels = kmeans.fit(x, 5, kmeans.Settings(), seed=0).labels
    assert accuracy(labels, np.tile(np.arange(3), 4)) > 0.5


def test_mini_batches_find_the_blobs() -> None:
    x, truth = blobs(each=100)
    mini = kmeans.Settings(batch_size=64, iterations=60, starts=3)
    assert accuracy(kmeans.fit(x, 6, mini, seed=0).labels, truth) > 0.9


@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("linkage", ["average", "ward"])
def test_the_chain_equals_scipy(linkage, rows: int, columns: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(rows, columns + 1))
    x = ahc.unit_rows(x) if linkage == "average" else x
    ours, theirs = ahc.nearest_neighbour_chain(x, linkage), ahc.linkage_reference(x, linkage)
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=1e-7)
    np.testing.assert_allclose(cophenet(ours), cophenet(theirs), atol=1e-7)


@pytest.mark.parametrize("linkage", ["average", "ward", "complete", "single"])
@pytest.mark.parametrize("clusters", [1, 5, 120])
def test_labels_equal_scipys_cut(linkage, clusters: int) -> None:
    x, _ = blobs(noise=0.5)
    found = ahc.fit(x, clusters, ahc.Settings(linkage=linkage), seed=0)
    rows = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    theirs = fcluster(ahc.linkage_reference(rows, linkage), clusters, "maxclust")
    assert adjusted_mutual_information(found.labels, theirs) == pytest.approx(1.0)
    assert found.labels[0] == 0


def test_duplicates_and_zero_vectors_are_no_trouble() -> None:
    x = torch.cat([torch.eye(4).repeat(5, 1), torch.zeros(2, 4)])
    # Duplicates have distance 0 and merge first; a zero vector has distance 1 to everything.
    labels = ahc.fit(x, 6, ahc.Settings(), seed=0).labels
    assert accuracy(labels, np.r_[np.tile(np.arange(4), 5), 4, 5]) == 1


def test_pairs_beyond_memory_are_refused_with_a_remedy() -> None:
    x, _ = blobs()
    tight = ahc.Settings(linkage="complete", max_pairs=10)
    with pytest.raises(ValueError, match="use average or ward"):
        ahc.fit(x, 3, tight, seed=0)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (kmeans, {"starts": 0}),
        (kmeans, {"tolerance": -1.0}),
        (kmeans, {"batch_size": 0}),
        (kmeans, {"norm": "l1"}),
        (ahc, {"linkage": "median"}),
        (ahc, {"max_pairs": 0}),
    ],
)
def test_bad_settings_are_refused(method, values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        method.Settings(**values)

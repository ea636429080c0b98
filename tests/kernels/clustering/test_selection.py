"""The number of clusters and mu chosen without labels, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from goldcrest.kernels.clustering import ahc, cimc, selection
from goldcrest.kernels.metrics.clustering import adjusted_mutual_information


def speakers(sizes: list[int], *, noise: float, columns: int = 24, seed: int = 0):
    """Vectors (N, D) of speakers with the given numbers of utterances, and who spoke."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), columns))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    x = centres[truth] + noise * rng.normal(size=(len(truth), columns))
    return torch.from_numpy(x.astype(np.float32)), truth


@pytest.mark.parametrize("seed", [0, 1])
def test_the_number_of_unbalanced_speakers_is_found(seed: int) -> None:
    sizes = [5, 6, 7, 8, 8, 9, 10, 10, 12, 12, 14, 15, 18, 20, 24, 30, 35, 40, 45, 50]
    x, truth = speakers(sizes, noise=0.08, seed=seed)
    found, scores = selection.number_of_clusters(x, ahc.Settings(), seed=seed)
    assert 15 <= found <= 24  # 20 in truth, the smallest of 5 utterances
    assert scores[found] == max(scores.values())
    labels = ahc.fit(x, found, ahc.Settings(), seed=0).labels
    assert adjusted_mutual_information(labels, truth) > 0.94


def test_the_search_range() -> None:
    numbers = selection.StabilitySettings().numbers(800)
    assert (numbers[0], numbers[-1]) == (20, 200)  # sqrt(N/2) and N/4
    assert selection.StabilitySettings(least=3, most=5).numbers(100) == [3, 4, 5]
    assert selection.StabilitySettings().numbers(2) == [1]


def test_the_choice_depends_on_the_seed_alone() -> None:
    x, _ = speakers([10] * 6, noise=0.3)
    first, again = (selection.number_of_clusters(x, ahc.Settings(), seed=5) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    "values", [{"resamples": 1}, {"share": 1.0}, {"least": 0}, {"least": 5, "most": 4}]
)
def test_bad_search_settings_are_refused(values) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(values)))):
        selection.StabilitySettings(**values)


def test_agreement_prefers_the_candidate_nearest_to_the_others() -> None:
    truth = np.repeat(np.arange(5), 10)
    off = truth.copy()
    off[::4] = 0
    value, scores = selection.by_agreement({1.0: [off], 2.0: [truth]}, truth)
    assert value == 2.0
    assert scores[2.0] == pytest.approx(1.0)
    assert scores[1.0] < 0.9
    with pytest.raises(ValueError, match="at least one candidate"):
        selection.by_agreement({1.0: []}, truth)


def test_agreement_with_ahc_finds_mu_for_unbalanced_speakers(loop) -> None:
    # The study's mu = 3.5 forces equal sizes and splits the big speakers; mu near 1 does not.
    x, truth = speakers([4, 4, 5, 5, 6, 8, 10, 12, 60, 80, 100, 120], noise=0.12)
    reference = ahc.fit(x, 16, ahc.Settings(), seed=0).labels
    train = loop(epochs=30, batch_size=138, learning_rate=0.03, adam=True)
    settings = {"hidden": (32, 32), "terms": {"imsat": 1.0}}
    found = {
        mu: [cimc.fit(x, 16, cimc.Settings(mu=mu, **settings), seed=0, train=train).labels]
        for mu in (1.1, 3.5)
    }
    chosen, _ = selection.by_agreement(found, reference)
    quality = {mu: adjusted_mutual_information(found[mu][0], truth) for mu in found}
    assert chosen == 1.1
    assert quality[1.1] > quality[3.5]

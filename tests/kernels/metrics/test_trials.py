"""Trial lists: complete, distinct, seeded, within corpus and sex."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.metrics.trials import Trials, make_trials


def pairs(trials: Trials, target: bool) -> list[tuple[int, int]]:
    chosen = trials.target == target
    return list(zip(trials.first[chosen].tolist(), trials.second[chosen].tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from(["x", "y"])), min_size=2, max_size=24
    ),
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_trials_are_a_distinct_sample_of_all_allowed_pairs(
    utterances: list[tuple[str, str]], limit: int, seed: int
) -> None:
    speakers = [f"{corpus}-{speaker}" for speaker, corpus in utterances]
    corpora = [corpus for _, corpus in utterances]
    sexes = [{"a": "F", "b": "M", "c": "F"}.get(speaker) for speaker, _ in utterances]
    allowed: dict[str, dict[bool, set[tuple[int, int]]]] = {
        corpus: {True: set(), False: set()} for corpus in set(corpora)
    }
    for a, b in combinations(range(len(utterances)), 2):
        if corpora[a] == corpora[b] and speakers[a] == speakers[b]:
            allowed[corpora[a]][True].add((a, b))
        elif corpora[a] == corpora[b] and sexes[a] == sexes[b]:
            allowed[corpora[a]][False].add((a, b))
    usable = {corpus for corpus, both in allowed.items() if both[True] and both[False]}
    if not usable:
        with pytest.raises(ValueError, match="no verification trials"):
            make_trials(speakers, corpora, sexes, seed=seed)
        return
    trials = make_trials(
        speakers, corpora, sexes, max_targets=limit, max_nontargets=limit, seed=seed
    )
    assert set(trials.corpus.tolist()) == usable
    assert set(trials.left_out) == set(corpora) - usable
    for kind in (True, False):
        found = pairs(trials, kind)
        assert len(set(found)) == len(found)
        for corpus in usable:
            inside = {pair for pair in found if corpora[pair[0]] == corpus}
            assert inside <= allowed[corpus][kind]
            assert len(inside) == min(limit, len(allowed[corpus][kind]))


def test_seeded_and_independent_of_other_corpora() -> None:
    speakers = [f"s{k % 7}" for k in range(200)]
    corpora = ["one"] * 100 + ["two"] * 100
    options = {"max_targets": 50, "max_nontargets": 50}
    a, b = (make_trials(speakers, corpora, seed=3, **options) for _ in range(2))
    np.testing.assert_array_equal(a.first, b.first)
    np.testing.assert_array_equal(a.second, b.second)
    other = make_trials(speakers, corpora, seed=4, **options)
    assert (a.first != other.first).any()
    alone = make_trials(speakers[:100], corpora[:100], seed=3, **options)
    np.testing.assert_array_equal(alone.first, a.first[a.corpus == "one"])


def test_pairs_are_drawn_evenly() -> None:
    # 20 utterances of 4 speakers have 150 non-target pairs; 15 are drawn 800 times, so each is
    # expected 80 times with deviation sqrt(80 x 0.9) = 8.5; 5 deviations are allowed.
    speakers = [f"s{k % 4}" for k in range(20)]
    counts: dict[tuple[int, int], int] = {}
    for seed in range(800):
        for pair in pairs(make_trials(speakers, max_nontargets=15, seed=seed), False):
            counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 150
    assert max(abs(count - 80) for count in counts.values()) < 5 * 8.5


def test_speakers_of_many_utterances_need_no_list_of_all_pairs() -> None:
    # 200,000 utterances have 2e10 pairs.
    speakers = np.repeat(np.arange(20), 10_000).astype(str).tolist()
    trials = make_trials(speakers)
    assert len(trials) == 8000
    assert len(set(pairs(trials, False))) == 4000


def test_one_speaker_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="pack: all 3 utterances are of one speaker"):
        make_trials(["a", "a", "a"], ["pack"] * 3)


def test_other_lists_without_trials() -> None:
    with pytest.raises(ValueError, match="none of its 3 speakers has two utterances"):
        make_trials(["a", "b", "c"])
    with pytest.raises(ValueError, match="no two of its 2 speakers are of the same sex"):
        make_trials(["a", "a", "b"], None, ["M", "M", "F"])
    with pytest.raises(ValueError, match="no utterances"):
        make_trials([])
    with pytest.raises(ValueError, match="one length"):
        make_trials(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="at least 1"):
        make_trials(["a", "b"], max_targets=0)


def test_a_corpus_without_both_kinds_is_left_out_with_its_reason() -> None:
    trials = make_trials(["a", "a", "b", "b", "z", "z"], ["x"] * 4 + ["solo"] * 2)
    assert set(trials.corpus.tolist()) == {"x"}
    assert "one speaker" in trials.left_out["solo"]

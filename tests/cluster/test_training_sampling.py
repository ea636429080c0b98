"""Sampling: what belongs to which step, as properties over shapes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.errors import InputError, StepError
from goldcrest.cluster.training_config import TrainingConfig
from goldcrest.cluster.training_sampling import (
    Sampler,
    accumulation_steps,
    chunks_of,
    epoch_batches,
    kept_randomness,
    seed_chunk,
    steps_in_epoch,
    unit_batches,
)
from tests.cluster import training_toys as toys


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 200),
    batch=st.integers(1, 40),
    micro=st.none() | st.integers(1, 40),
    world=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_every_chunk_counts_its_examples_once(
    examples: int, batch: int, micro: int | None, world: int, drop_last: bool
) -> None:
    """Mean over workers of the weighted sum over chunks = mean over the step's examples."""
    config = TrainingConfig(batch_size=batch, micro_batch_size=micro, drop_last=drop_last)
    if drop_last and examples < batch:
        with pytest.raises(InputError, match="fewer than batch_size"):
            steps_in_epoch(config, examples)
        return
    value = np.random.default_rng(0).normal(size=examples)
    seen = []
    for indices in epoch_batches(config, examples, seed=1, epoch=0):
        per_rank = [chunks_of(indices, config, rank=r, world=world) for r in range(world)]
        assert len({len(chunks) for chunks in per_rank}) == 1  # collectives need equal counts
        assert len(per_rank[0]) <= accumulation_steps(config, world)
        assert all(len(c.indices) <= (micro or batch) for chunks in per_rank for c in chunks)
        sums = [sum(c.weight * value[c.indices].mean() for c in chunks) for chunks in per_rank]
        assert np.mean(sums) == pytest.approx(value[indices].mean())
        seen.extend(indices)
    assert len(seen) == len(set(seen)) == (examples // batch * batch if drop_last else examples)


def test_two_workers_see_what_one_worker_sees_in_two_micro_batches() -> None:
    config = TrainingConfig(batch_size=8, micro_batch_size=4)
    batch = np.arange(8)
    alone = chunks_of(batch, config, rank=0, world=1)
    shared = [chunks_of(batch, config, rank=r, world=2)[0] for r in range(2)]
    for one, two in zip(alone, shared, strict=True):
        assert one.number == two.number
        np.testing.assert_array_equal(one.indices, two.indices)
        first = seed_chunk(3, 1, 2, one.number).normal(size=4)
        np.testing.assert_array_equal(first, seed_chunk(3, 1, 2, two.number).normal(size=4))


def test_equal_chunks_of_one_round_weigh_exactly_one() -> None:
    config = TrainingConfig(batch_size=8)
    for world in (1, 2, 4):
        assert chunks_of(np.arange(8), config, rank=0, world=world)[0].weight == 1.0


def test_orders_differ_by_epoch_and_seed_and_repeat() -> None:
    config = TrainingConfig(batch_size=10)
    draws = {
        (seed, epoch): tuple(np.concatenate(epoch_batches(config, 50, seed=seed, epoch=epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(draws.values())) == 4
    again = np.concatenate(epoch_batches(config, 50, seed=1, epoch=1))
    assert tuple(again) == draws[1, 1]


def test_a_chunk_seeds_every_global_generator_and_the_caller_keeps_his() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    with kept_randomness():
        seed_chunk(0, 0, 0, 0)
        first = (torch.rand(1).item(), random.random(), np.random.rand())
        seed_chunk(0, 0, 0, 0)
        assert first == (torch.rand(1).item(), random.random(), np.random.rand())
        seed_chunk(0, 0, 0, 1)
        assert first != (torch.rand(1).item(), random.random(), np.random.rand())
    assert expected == (torch.rand(1).item(), random.random(), np.random.rand())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=80),
    units=st.integers(1, 100),
    seed=st.integers(0, 3),
)
def test_batches_by_units_hold_every_example_once(sizes: list[int], units: int, seed: int) -> None:
    known = np.array(sizes)
    if known.max() > units:
        with pytest.raises(InputError, match=f"has {known.max()} units"):
            unit_batches(units, known, seed=seed)
        return
    batches = unit_batches(units, known, seed=seed)
    assert sorted(np.concatenate(batches)) == list(range(len(known)))
    padded = [len(each) * known[each].max() for each in batches]
    assert max(padded) <= units
    # None could take the next one's first example too: no batch is smaller than it must be.
    for one, two in itertools.pairwise(batches):
        assert (len(one) + 1) * known[two[0]] > units


class Sized(toys.Uneven):  # type: ignore[misc]
    """Uneven examples of given sizes and weights."""

    def __init__(self, sizes: np.ndarray, weights: np.ndarray) -> None:
        self.examples, self._sizes, self._weights = len(sizes), sizes, weights

    def sizes(self) -> np.ndarray:
        return self._sizes

    def weights(self) -> np.ndarray:
        return self._weights


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    units=st.integers(30, 200),
    micro=st.none() | st.integers(30, 60),
    world=st.integers(1, 4),
)
def test_a_step_is_the_mean_over_its_weights_however_it_is_cut(
    sizes: list[int], units: int, micro: int | None, world: int
) -> None:
    rng = np.random.default_rng(0)
    known, weights = np.array(sizes), rng.integers(1, 9, len(sizes))
    value = rng.normal(size=len(sizes))
    config = TrainingConfig(batch_units=units, micro_batch_units=micro)
    sampler = Sampler(config, Sized(known, weights), seed=1)

    def mean(places: np.ndarray) -> float:
        return float(np.average(value[places], weights=weights[places]))

    for batch in sampler.batches(0):
        per_rank = [sampler.chunks(batch, rank=r, world=world) for r in range(world)]
        assert len({len(chunks) for chunks in per_rank}) == 1
        sums = [sum(c.weight * mean(c.indices) for c in chunks) for chunks in per_rank]
        assert np.mean(sums) == pytest.approx(mean(batch))
        for chunk in (c for chunks in per_rank for c in chunks if micro is not None):
            assert len(chunk.indices) * known[chunk.indices].max() <= micro or len(batch) <= world
    assert len(sampler.batches(0)) == len(sampler.batches(7)) == sampler.steps_per_epoch


def test_an_epoch_by_units_is_another_order_of_the_same_batches() -> None:
    config = TrainingConfig(batch_units=60)
    sampler = Sampler(config, toys.Uneven(), seed=1)
    first, second = ([tuple(b) for b in sampler.batches(epoch)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert first == [tuple(b) for b in Sampler(config, toys.Uneven(), seed=1).batches(0)]
    assert sorted(first) != sorted(
        tuple(b) for b in Sampler(config, toys.Uneven(), seed=2).batches(0)
    )


def test_sizes_that_cannot_be_used_are_told() -> None:
    with pytest.raises(ValueError, match="batch_units, which is not set"):
        TrainingConfig(micro_batch_units=8)
    with pytest.raises(ValueError, match="use micro_batch_units"):
        TrainingConfig(batch_units=8, micro_batch_size=8)
    config = TrainingConfig(batch_units=60)
    with pytest.raises(InputError, match="have no sizes"):
        Sampler(config, toys.Toy(), seed=0)
    ones = np.ones(3)
    for sizes, weights, said in [
        (ones, np.zeros(3), "not positive"),
        (ones, np.ones(4), r"weights\(\) returned values \(4,\) for 3"),
    ]:
        with pytest.raises(StepError, match=said):
            Sampler(config, Sized(sizes, weights), seed=0)

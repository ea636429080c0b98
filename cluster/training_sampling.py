"""Which examples and which randomness belong to which step: the engine owns the sampling.

Everything is a function of (seed, epoch, step, chunk), nothing is a stream: a run that is resumed
at epoch k draws what an undisturbed run would have drawn. One optimizer step takes `batch_size`
examples and cuts them into equal chunks, one per worker and micro-batch. Randomness belongs to the
chunk, not to the worker, so 2 workers x 1 micro-batch and 1 worker x 2 micro-batches see the same.

Examples that differ in size can be taken by units instead (`batch_units`): they are sorted by size
and cut into batches once, by the seed alone; an epoch is a permutation of these batches. Every
epoch has the same number of steps, as schedules and the count of steps need it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from goldcrest.cluster.api import UnevenObjective
from goldcrest.cluster.errors import InputError, StepError
from goldcrest.cluster.training_config import TrainingConfig

if TYPE_CHECKING:
    from goldcrest.cluster.api import Objective

# First word of every seed sequence: keeps the purposes apart.
_ORDER, _CHUNK, _MODEL, _EVALUATE, _CUT = range(5)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The examples of one worker's micro-batch and its share in the step's loss.

    `weight` makes the mean over workers of the sum over micro-batches equal the mean over all
    examples of the step, also where chunks differ in size; it is exactly 1.0 for equal chunks and
    one micro-batch. An empty chunk borrows its neighbour's examples at weight 0, because every
    worker must take part in every collective.
    """

    indices: np.ndarray
    weight: float
    number: int


def accumulation_steps(config: TrainingConfig, world: int) -> int:
    """Micro-batches per worker and optimizer step; by units it varies: 2 stands for "several"."""
    if config.batch_units is not None:
        return 1 if config.micro_batch_units is None else 2
    if config.micro_batch_size is None:
        return 1
    return math.ceil(config.batch_size / (world * config.micro_batch_size))


def steps_in_epoch(config: TrainingConfig, examples: int) -> int:
    """Optimizer steps of one epoch; an InputError if there would be none."""
    steps, rest = divmod(examples, config.batch_size)
    if rest and not config.drop_last:
        steps += 1
    if steps == 0:
        raise InputError(
            f"{examples} examples are fewer than batch_size={config.batch_size}: no step to train",
            hint="lower batch_size, or set drop_last to false",
        )
    return steps


def epoch_batches(
    config: TrainingConfig, examples: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """The example indices of each step: one permutation per (seed, epoch), cut into batches."""
    order = np.random.default_rng([_ORDER, seed, epoch]).permutation(examples)
    steps = steps_in_epoch(config, examples)
    return [order[i * config.batch_size : (i + 1) * config.batch_size] for i in range(steps)]


def chunks_of(batch: np.ndarray, config: TrainingConfig, *, rank: int, world: int) -> list[Chunk]:
    """The micro-batches of worker `rank` for one step's examples, all of which count alike."""
    micro = config.micro_batch_size or math.ceil(config.batch_size / world)
    rounds = math.ceil(len(batch) / (world * micro))
    return _cut(batch, np.ones(len(batch)), rounds, rank=rank, world=world)


def _cut(
    batch: np.ndarray, weights: np.ndarray, rounds: int, *, rank: int, world: int
) -> list[Chunk]:
    """Worker `rank`'s part of the examples cut into `rounds` chunks for each of `world` workers."""
    parts = np.array_split(np.arange(len(batch)), world * rounds)
    mine = []
    for number in range(rank, len(parts), world):
        part = parts[number]
        weight = float(weights[part].sum() * world / weights.sum())
        chosen = batch[part if len(part) else parts[0]]
        mine.append(Chunk(indices=chosen, weight=weight, number=number))
    return mine


def unit_batches(units: int, sizes: np.ndarray, *, seed: int) -> list[np.ndarray]:
    """Examples of like size in batches whose padded size (count x largest) is at most `units`.

    Raises InputError for an example that is larger alone.
    """
    if int(sizes.max(initial=0)) > units:
        raise InputError(
            f"an example has {int(sizes.max())} units, more than batch_units={units}",
            hint="raise batch_units, or cut long examples",
        )
    shuffled = np.random.default_rng([_CUT, seed]).permutation(len(sizes))
    order = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        # Sorted: the next example is the largest of the batch that it would join.
        if end == len(order) or (end - start + 1) * int(sizes[order[end]]) > units:
            batches.append(order[start:end])
            start = end
    return batches


class Sampler:
    """The steps of a training: batches of an epoch, and a worker's chunks of a batch.

    Raises InputError for settings that leave no step to train, StepError for an objective whose
    sizes or weights can't be used.
    """

    def __init__(self, config: TrainingConfig, objective: Objective, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self.examples = len(objective)
        self._sizes: np.ndarray | None = None
        self._weights = np.ones(self.examples)
        if isinstance(objective, UnevenObjective):
            self._sizes = _checked("sizes", objective.sizes(), self.examples)
            self._weights = _checked("weights", objective.weights(), self.examples)
        self._cut_batches: list[np.ndarray] | None = None
        if config.batch_units is not None:
            if self._sizes is None:
                raise InputError(
                    "batch_units is set, but the examples of this training have no sizes",
                    hint="set batch_size instead",
                )
            self._cut_batches = unit_batches(config.batch_units, self._sizes, seed=seed)
            self.steps_per_epoch = len(self._cut_batches)
        else:
            self.steps_per_epoch = steps_in_epoch(config, self.examples)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The example indices of each step of an epoch."""
        if self._cut_batches is None:
            return epoch_batches(self.config, self.examples, seed=self.seed, epoch=epoch)
        order = np.random.default_rng([_ORDER, self.seed, epoch]).permutation(self.steps_per_epoch)
        return [self._cut_batches[place] for place in order]

    def chunks(self, batch: np.ndarray, *, rank: int, world: int) -> list[Chunk]:
        """The micro-batches of worker `rank` for one step's examples."""
        rounds = self._rounds(batch, world)
        return _cut(batch, self._weights[batch], rounds, rank=rank, world=world)

    def _rounds(self, batch: np.ndarray, world: int) -> int:
        """Forward passes of each worker over a batch."""
        if self._cut_batches is None:
            micro = self.config.micro_batch_size or math.ceil(self.config.batch_size / world)
            return math.ceil(len(batch) / (world * micro))
        assert self._sizes is not None and self.config.batch_units is not None
        limit = self.config.micro_batch_units or self.config.batch_units
        most, rounds = math.ceil(len(batch) / world), 1
        while rounds < most and _padded(self._sizes[batch], world * rounds) > limit:
            rounds += 1
        return rounds


def _padded(sizes: np.ndarray, parts: int) -> int:
    """Units of the largest of equal parts, padding counted."""
    return max(len(p) * int(p.max()) for p in np.array_split(sizes, parts) if len(p))


def _checked(name: str, values: np.ndarray, examples: int) -> np.ndarray:
    if values.shape != (examples,):
        raise StepError(f"{name}() returned values {values.shape} for {examples} examples")
    if not bool((values > 0).all()):
        raise StepError(f"{name}() returned a value that is not positive")
    return values


def _seed_globals(sequence: np.random.SeedSequence) -> None:
    """Seed torch (dropout), `random` and NumPy's old generator (used by transformers' masking)."""
    words = sequence.generate_state(3, np.uint64)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[2]) % 2**32)


def seed_model(seed: int) -> None:
    """Put every global generator into the state in which the model is built."""
    _seed_globals(np.random.SeedSequence([_MODEL, seed]))


def seed_evaluation(seed: int, epoch: int) -> None:
    """Put every global generator into the state of the evaluation after `epoch`."""
    _seed_globals(np.random.SeedSequence([_EVALUATE, seed, epoch]))


def seed_chunk(seed: int, epoch: int, step: int, chunk: int) -> np.random.Generator:
    """Seed the global generators for one chunk; returns the generator its batch is drawn with."""
    sequence = np.random.SeedSequence([_CHUNK, seed, epoch, step, chunk])
    globals_, batch = sequence.spawn(2)
    _seed_globals(globals_)
    return np.random.default_rng(batch)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Give the caller's global generators back as they were (training in the caller's process)."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Which examples and which randomness belong to which step: the engine owns the sampling.

Everything is a function of (seed, epoch, step, chunk), nothing is a stream: a run that is resumed
at epoch k draws what an undisturbed run would have drawn. One optimizer step takes `batch_size`
examples and cuts them into equal chunks, one per worker and micro-batch. Randomness belongs to the
chunk, not to the worker, so 2 workers x 1 micro-batch and 1 worker x 2 micro-batches see the same.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.training_config import TrainingConfig

# First word of every seed sequence: keeps the purposes apart.
_ORDER, _CHUNK, _MODEL, _EVALUATE = range(4)


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
    """Micro-batches per worker and optimizer step."""
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
    """The micro-batches of worker `rank` for one step's examples."""
    micro = config.micro_batch_size or math.ceil(config.batch_size / world)
    rounds = math.ceil(len(batch) / (world * micro))
    parts = np.array_split(batch, world * rounds)
    mine = []
    for number in range(rank, len(parts), world):
        part = parts[number]
        weight = len(part) * world / len(batch)
        mine.append(Chunk(indices=part if len(part) else parts[0], weight=weight, number=number))
    return mine


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

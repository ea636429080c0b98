"""What steps that train the speaker network share: a batch that fits corpus and network."""

from __future__ import annotations

import math

from goldcrest.cluster.api import StepError, TrainingConfig


def fitting(training: TrainingConfig, examples: int) -> TrainingConfig:
    """The config with a batch of at most `examples`: a larger one would never be filled.

    Raises StepError where some forward pass would see one example: networks with batch
    normalisation cannot be trained on it.
    """
    if training.batch_size > examples:
        training = training.model_copy(update={"batch_size": examples, "micro_batch_size": None})
    batches = {training.batch_size}
    if not training.drop_last:
        batches.add(examples % training.batch_size or training.batch_size)
    if min(smallest_chunk(training, batch) for batch in batches) < 2:
        raise StepError(
            f"of {examples} examples in batches of {training.batch_size} some forward pass would "
            "see one alone, which batch normalisation cannot do",
            hint="raise batch_size or micro_batch_size, train on fewer workers, or set drop_last",
        )
    return training


def smallest_chunk(training: TrainingConfig, batch: int) -> int:
    """Examples of the smallest forward pass over a batch: the engine cuts it into equal chunks."""
    micro = training.micro_batch_size or math.ceil(training.batch_size / training.workers)
    rounds = math.ceil(batch / (training.workers * micro))
    return batch // (training.workers * rounds)


def check_batches(training: TrainingConfig) -> None:
    """ValueError for a training whose every batch would break batch normalisation."""
    if smallest_chunk(training, training.batch_size) < 2:
        raise ValueError(
            f"batch_size {training.batch_size}, micro_batch_size {training.micro_batch_size} and "
            f"workers {training.workers} leave one example to a forward pass: batch normalisation "
            "needs two"
        )

"""Sampling with a stream of random numbers per prompt, by the Gumbel-max trick.

Source: E. J. Gumbel, "Statistical Theory of Extreme Values", 1954; C. Maddison et al., "A*
Sampling", NeurIPS 2014, section 2: with g_i independent standard Gumbel noise,
argmax_i (log p_i + g_i) is a sample of p.

transformers draws from torch's global generator: what a prompt gets would depend on the prompts
beside it and on other threads. Here the noise is added as the last step before a greedy choice,
from a generator that belongs to the prompt. Top-k and top-p are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from goldcrest.tasks.language.generation import GenerationSettings


class GumbelNoise(LogitsProcessor):
    """Scores (B, V) plus noise: the row's maximum is a sample of its softmax."""

    def __init__(self, seed: int, streams: Sequence[int]) -> None:
        """`streams` number the B rows; a row's noise depends on its number and the seed alone."""
        self._generators = [np.random.default_rng([seed, stream]) for stream in streams]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noise for the next token of every row; `input_ids` do not matter."""
        noise = np.stack([each.gumbel(size=scores.shape[1]) for each in self._generators])
        return scores + torch.from_numpy(noise).to(scores)


class Temperature(LogitsProcessor):
    """Scores (B, V) less their row's maximum, divided by the temperature.

    transformers' own divides alone: at 1e-38 the likeliest tokens are all infinite, no longer in
    order. Less the maximum the likeliest is 0 however small the temperature is.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What softmax makes probabilities of; `input_ids` do not matter."""
        below = scores - scores.amax(dim=-1, keepdim=True)
        return (below.double() / self._temperature).to(scores)


def processors(settings: GenerationSettings, streams: Sequence[int]) -> LogitsProcessorList:
    """What is done to the logits before the greatest is taken: nothing, where nothing is drawn."""
    made = LogitsProcessorList()
    if settings.temperature == 0:
        return made
    if settings.temperature != 1:
        made.append(Temperature(settings.temperature))
    if settings.top_k is not None:
        made.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        made.append(TopPLogitsWarper(settings.top_p))
    made.append(GumbelNoise(settings.seed, streams))
    return made

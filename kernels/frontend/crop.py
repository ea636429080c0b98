"""Fixed-length crops of waveforms or features, for training and for test-time averaging.

Source: spec sections 4, 7 and 12: random 2-s crops with wrapped short files; five equally spaced
3-s crops for scoring.

    T samples or frames along the first axis
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_crop", "spaced_crops", "wrap"]


def wrap(signal: Tensor, length: int) -> Tensor:
    """At least `length` along the first axis: short signals are repeated, long ones untouched.

    Raises:
        ValueError: an empty signal, or a length below 1.
    """
    if signal.shape[0] == 0:
        raise ValueError("an empty signal cannot be cropped")
    if length < 1:
        raise ValueError(f"the crop must have at least 1 sample or frame, not {length}")
    missing = length - signal.shape[0]
    if missing <= 0:
        return signal
    index = torch.arange(length, device=signal.device) % signal.shape[0]
    return signal[index]


def random_crop(signal: Tensor, length: int, rng: np.random.Generator) -> Tensor:
    """`length` consecutive entries from a random place, wrapped when the signal is shorter."""
    signal = wrap(signal, length)
    start = int(rng.integers(signal.shape[0] - length + 1))
    return signal[start : start + length]


def spaced_crops(signal: Tensor, length: int, count: int) -> Tensor:
    """`count` equally spaced crops, first at the start and last at the end: (count, length, ...).

    Raises:
        ValueError: fewer than one crop.
    """
    if count < 1:
        raise ValueError(f"at least one crop is needed, not {count}")
    signal = wrap(signal, length)
    starts = np.linspace(0, signal.shape[0] - length, count).round().astype(int)
    return torch.stack([signal[s : s + length] for s in starts])

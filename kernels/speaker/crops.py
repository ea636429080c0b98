"""Pieces of equal length cut from features: for training batches and test-time averaging.

Sources: wrap padding and evenly spaced test crops as usual for VoxCeleb (J. S. Chung et al.,
"VoxCeleb2", Interspeech 2018, section 4.3: test-time augmentation).

F feature dimensions   T frames of the utterance   L frames of a crop   K crops
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wrap_pad(features: Tensor, frames: int) -> Tensor:
    """Repeat features (F, T) from their start until they have at least `frames` frames.

    Longer features come back as they are. Raises ValueError for features without frames.
    """
    length = features.shape[1]
    if length == 0:
        raise ValueError("features have no frames; an utterance needs at least one")
    if length >= frames:
        return features
    return features[:, torch.arange(frames) % length]


def random_crop(features: Tensor, frames: int, rng: np.random.Generator) -> Tensor:
    """A piece (F, L) of features (F, T) at a place drawn from `rng`, wrap-padded if too short."""
    padded = wrap_pad(features, frames)
    start = int(rng.integers(0, padded.shape[1] - frames + 1))
    return padded[:, start : start + frames]


def even_crops(features: Tensor, frames: int, count: int) -> Tensor:
    """`count` equally spaced pieces (K, F, L) of features (F, T), the first and last at the ends.

    Too short features are wrap-padded, and all pieces are then the same. Raises ValueError for a
    `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    padded = wrap_pad(features, frames)
    starts = np.linspace(0, padded.shape[1] - frames, count).round().astype(int)
    return torch.stack([padded[:, start : start + frames] for start in starts.tolist()])

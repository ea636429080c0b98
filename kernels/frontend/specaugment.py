"""SpecAugment: masks over time and frequency.

Source: Park et al., "SpecAugment" (2019), without time warping; widths of spec section 6. Features
are mean-subtracted, so that the masked value 0 is the mean.

    B utterances   T frames   C coefficients or mel bins
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["SpecAugmentSettings", "spec_augment"]


@dataclass(frozen=True, kw_only=True)
class SpecAugmentSettings:
    """One draw of masks per utterance."""

    time_masks: int = 1
    """Masks over time per utterance."""
    time_width: int = 10
    """Largest width of a time mask in frames; the width is uniform in 0..time_width."""
    frequency_masks: int = 1
    """Masks over coefficients per utterance."""
    frequency_width: int = 8
    """Largest width of a frequency mask in bins."""
    largest_share: float = 1.0
    """No mask covers more than this share of the frames or bins (0.1 in the fusion system)."""

    def __post_init__(self) -> None:
        counts = (self.time_masks, self.time_width, self.frequency_masks, self.frequency_width)
        if min(counts) < 0:
            raise ValueError("numbers and widths of masks must not be negative")
        if not 0.0 <= self.largest_share <= 1.0:
            raise ValueError(f"largest_share must lie in [0, 1], not {self.largest_share}")


def spec_augment(
    features: Tensor,
    lengths: Tensor | None,
    settings: SpecAugmentSettings,
    rng: np.random.Generator,
) -> Tensor:
    """Mask with 0: (B, T, C) -> (B, T, C), the input untouched.

    Args:
        features: (B, T, C) float, mean-subtracted, padded at the end.
        lengths: (B,) valid frames, so that masks fall on speech; None when all are valid.
        settings: see `SpecAugmentSettings`.
        rng: the only source of randomness.

    Raises:
        ValueError: not a batch of matrices.
    """
    if features.ndim != 3:
        raise ValueError(f"features must be (B, T, C), not {tuple(features.shape)}")
    batch, frames, bins = features.shape
    valid = [frames] * batch if lengths is None else [int(n) for n in lengths]
    masked = features.clone()
    for b in range(batch):
        for _ in range(settings.time_masks):
            start, end = _span(valid[b], settings.time_width, settings.largest_share, rng)
            masked[b, start:end] = 0.0
        for _ in range(settings.frequency_masks):
            start, end = _span(bins, settings.frequency_width, settings.largest_share, rng)
            masked[b, :, start:end] = 0.0
    return masked


def _span(size: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """A random interval of at most `width` and at most `share` of `size` entries."""
    width = int(rng.integers(min(width, int(share * size)) + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width

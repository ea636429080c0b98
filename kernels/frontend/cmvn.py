"""Cepstral mean (and variance) normalisation, per utterance or in a sliding window.

Source: Kaldi `feat/feature-functions.cc` (SlidingWindowCmn, centred). The window of `window` frames
around frame t is [t - window/2, t + window/2); at the borders it is shifted, not shrunk, and where
the utterance is shorter than the window it is the whole utterance.

`strength` < 1 subtracts only a part of the mean. The mean of a short utterance holds the channel,
but also the speaker's long-term spectrum and the sounds that happened to be said: taking all of it
away costs more speaker identity than the channel is worth where clips last a second or a few.

    T frames   C coefficients
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["global_cmvn", "sliding_cmn", "sliding_cmn_reference"]


def sliding_cmn(features: Tensor, window: int = 300, *, strength: float = 1.0) -> Tensor:
    """Subtract the mean of a centred sliding window: (T, C) -> (T, C), dtype kept.

    Args:
        features: (T, C) float, one utterance without padding.
        window: frames; 300 in the VoxCeleb recipe (3 s at a 10 ms shift).
        strength: share of the mean that is subtracted, in [0, 1].

    Raises:
        ValueError: not a matrix, window < 1, or a strength outside [0, 1].
    """
    _check(features, window, strength)
    frames = features.shape[0]
    if frames == 0:
        return features.clone()
    start, end = _bounds(frames, window, features.device)
    # Running sums in float64: differences of long float32 sums would lose the small means.
    sums = torch.zeros(frames + 1, features.shape[1], dtype=torch.float64, device=features.device)
    sums[1:] = features.double().cumsum(0)
    mean = (sums[end] - sums[start]) / (end - start)[:, None]
    return (features.double() - strength * mean).to(features.dtype)


def sliding_cmn_reference(features: Tensor, window: int = 300) -> Tensor:
    """Plain twin of `sliding_cmn`: one window at a time."""
    _check(features, window, 1.0)
    frames = features.shape[0]
    out = features.clone()
    for t in range(frames):
        start = t - window // 2
        end = start + window
        if start < 0:
            start, end = 0, end - start
        if end > frames:
            start, end = max(0, start - (end - frames)), frames
        out[t] = features[t] - features[start:end].mean(0)
    return out


def global_cmvn(
    features: Tensor, *, strength: float = 1.0, variance: bool = False, floor: float = 1e-8
) -> Tensor:
    """Subtract the utterance's mean and, if asked, divide by its standard deviation.

    Args:
        features: (T, C) float, one utterance without padding.
        strength: share of the mean that is subtracted, in [0, 1].
        variance: also scale every coefficient to unit variance.
        floor: smallest variance divided by.

    Raises:
        ValueError: not a matrix, or a strength outside [0, 1].
    """
    _check(features, 1, strength)
    if features.shape[0] == 0:
        return features.clone()
    mean = features.mean(0)
    centred = features - strength * mean
    if variance:
        spread = (features - mean).square().mean(0)
        centred = centred / spread.clamp_min(floor).sqrt()
    return centred


def _bounds(frames: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and one-past-last frame of every frame's window, (T,) int64 each."""
    latest_start = max(0, frames - window)
    start = (torch.arange(frames, device=device) - window // 2).clamp(0, latest_start)
    return start, (start + window).clamp_max(frames)


def _check(features: Tensor, window: int, strength: float) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must be (frames, coefficients), not {tuple(features.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1 frame, not {window}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], not {strength}")

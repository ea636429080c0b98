"""Additive noise at a chosen signal-to-noise ratio, and noises made without any recordings.

Source: spec section 6; Snyder et al., "MUSAN" (2015) and Kaldi `wav-reverberate` for the ranges.

    y = x + g n,    g = sqrt(10^((P_x - P_n - SNR) / 10)),    P = 10 log10(mean x^2)

    N samples of the speech   n samples of a noise
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SNR_RANGES",
    "add_noise",
    "babble",
    "fit_length",
    "pink_noise",
    "power_db",
    "white_noise",
]

SNR_RANGES = {"noise": (0.0, 15.0), "babble": (13.0, 20.0), "music": (5.0, 15.0)}
"""Usual ranges in dB per kind of noise (spec section 6)."""

BABBLE_TALKERS = (3, 8)
"""Fewest and most voices summed into babble."""


def power_db(waveform: Tensor, *, floor: float = 0.0) -> float:
    """Mean power in dB, 10 log10(mean x^2 + floor); minus infinity for silence without a floor.

    Recipes add a floor of 1e-4. On a [-1, 1] scale that is 16 dB above quiet speech, and the true
    ratio would miss the requested one by several dB: here silence is handled apart instead.
    """
    return float(10 * torch.log10(waveform.double().square().mean() + floor))


def fit_length(noise: Tensor, samples: int, rng: np.random.Generator) -> Tensor:
    """A stretch of `noise` of exactly `samples` samples: random start, repeated when too short.

    Raises:
        ValueError: an empty noise.
    """
    if noise.ndim != 1 or noise.shape[0] == 0:
        raise ValueError(f"a noise must be a non-empty vector, not {tuple(noise.shape)}")
    start = int(
        rng.integers(noise.shape[0] if noise.shape[0] <= samples else noise.shape[0] - samples + 1)
    )
    repeats = -(-(start + samples) // noise.shape[0])
    return noise.repeat(repeats)[start : start + samples]


def add_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Mix so that the ratio of mean powers is `snr_db`: (N,), (N,) -> (N,).

    Silent speech or silent noise comes back unchanged: no ratio exists.

    Raises:
        ValueError: different shapes, or a ratio that is not finite.
    """
    if waveform.shape != noise.shape or waveform.ndim != 1:
        raise ValueError(
            f"speech {tuple(waveform.shape)} and noise {tuple(noise.shape)} must be vectors of "
            "one length; see fit_length"
        )
    if not np.isfinite(snr_db):
        raise ValueError(f"the signal-to-noise ratio must be finite, not {snr_db} dB")
    if not bool(waveform.any()) or not bool(noise.any()):
        return waveform.clone()
    gain = 10 ** ((power_db(waveform) - power_db(noise) - snr_db) / 20)
    return waveform + gain * noise


def babble(voices: Sequence[Tensor], samples: int, rng: np.random.Generator) -> Tensor:
    """Several voices at once, each brought to the same power: -> (samples,).

    Raises:
        ValueError: no voice at all.
    """
    if not voices:
        raise ValueError("babble needs at least one voice")
    total = torch.zeros(samples)
    for voice in voices:
        part = fit_length(voice, samples, rng).float()
        total += part / part.square().mean().sqrt().clamp_min(1e-5)
    return total / len(voices)


def white_noise(samples: int, rng: np.random.Generator) -> Tensor:
    """Gaussian noise with a flat spectrum and unit power, (samples,) float32."""
    return torch.from_numpy(rng.standard_normal(samples).astype(np.float32))


def pink_noise(samples: int, rng: np.random.Generator) -> Tensor:
    """Gaussian noise whose power falls by 3 dB per octave, unit power, (samples,) float32."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum /= np.sqrt(np.maximum(np.arange(spectrum.shape[0]), 1))
    noise = np.fft.irfft(spectrum, n=samples)
    power = float(np.sqrt(np.mean(noise**2))) or 1.0
    return torch.from_numpy((noise / power).astype(np.float32))

"""Reverberation by convolution with a room impulse response (RIR).

Source: spec section 6; Ko et al., "A study on data augmentation of reverberant speech" (2017).

    y = (x * h / |h|_2)[: N], optionally shifted so that the direct path arrives at time 0

    N samples of the waveform   L samples of the impulse response
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["reverberate", "reverberate_reference", "synthetic_rir"]


def reverberate(waveform: Tensor, rir: Tensor, *, align: bool = True) -> Tensor:
    """Convolve with a room, by FFT: (N,), (L,) -> (N,), float32.

    Args:
        waveform: (N,) float.
        rir: (L,) float, any scale: it is brought to unit energy.
        align: drop the delay of the direct path (the largest absolute value of `rir`), so that
            speech and voice activity of clean and reverberant copy stay aligned.

    Raises:
        ValueError: not vectors, or an empty or all-zero response.
    """
    response, delay = _prepare(waveform, rir, align)
    samples = waveform.shape[0]
    if samples == 0:
        return waveform.float().clone()
    size = 1 << (samples + response.shape[0] - 2).bit_length()
    product = torch.fft.rfft(waveform.double(), size) * torch.fft.rfft(response, size)
    full = torch.fft.irfft(product, size)[: samples + response.shape[0] - 1]
    wet = torch.zeros(samples, dtype=torch.float64, device=waveform.device)
    kept = full[delay : delay + samples]
    wet[: kept.shape[0]] = kept
    return wet.float()


def reverberate_reference(waveform: Tensor, rir: Tensor, *, align: bool = True) -> Tensor:
    """Plain twin of `reverberate`: the convolution sum."""
    response, delay = _prepare(waveform, rir, align)
    out = torch.zeros(waveform.shape[0], dtype=torch.float64)
    for n in range(waveform.shape[0]):
        for k in range(response.shape[0]):
            source = n + delay - k
            if 0 <= source < waveform.shape[0]:
                out[n] += float(response[k]) * float(waveform[source])
    return out.float()


def synthetic_rir(
    t60: float, rng: np.random.Generator, *, sample_rate: int = 16_000, direct: float = 1.0
) -> Tensor:
    """A made-up room: a direct path followed by exponentially decaying Gaussian noise.

    Args:
        t60: seconds until the energy has fallen by 60 dB.
        rng: the only source of randomness.
        sample_rate: Hz.
        direct: amplitude of the direct path relative to the start of the tail's envelope.

    Returns:
        (L,) float32 with L = t60 seconds, unit energy.

    Raises:
        ValueError: `t60` is not positive.
    """
    if t60 <= 0 or sample_rate <= 0:
        raise ValueError(f"t60 and sample_rate must be positive, not {t60} s and {sample_rate} Hz")
    samples = max(2, math.ceil(t60 * sample_rate))
    time = np.arange(samples) / sample_rate
    # An amplitude of 10^-3 is -60 dB; the tail is scaled to carry about as much as the direct path.
    tail = rng.standard_normal(samples) * np.exp(-math.log(1e3) * time / t60)
    tail *= 1.0 / np.sqrt(np.sum(tail**2))
    tail[0] = direct
    return torch.from_numpy((tail / np.sqrt(np.sum(tail**2))).astype(np.float32))


def _prepare(waveform: Tensor, rir: Tensor, align: bool) -> tuple[Tensor, int]:
    if waveform.ndim != 1 or rir.ndim != 1:
        raise ValueError(
            f"waveform {tuple(waveform.shape)} and impulse response {tuple(rir.shape)} must be "
            "vectors"
        )
    norm = rir.double().norm()
    if rir.shape[0] == 0 or float(norm) == 0.0:
        raise ValueError("the impulse response is empty or all zero")
    delay = int(rir.abs().argmax()) if align else 0
    return rir.double() / norm, delay

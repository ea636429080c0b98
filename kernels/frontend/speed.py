"""Speed perturbation: resampling that is played at the old rate.

Source: Ko et al., "Audio augmentation for speech recognition" (2015); range 0.95-1.05 in chapter 9.
Tempo and pitch change together, so more than a few percent makes another speaker of it.

    N samples in   round(N / speed) samples out, up to one
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from scipy import signal
from torch import Tensor

__all__ = ["change_speed"]


def change_speed(waveform: Tensor, speed: float) -> Tensor:
    """Play `speed` times as fast: (N,) -> (about N / speed,) float32.

    Args:
        waveform: (N,) float.
        speed: factor between 0.5 and 2, taken to the nearest fraction with a denominator up to 100.

    Raises:
        ValueError: not a vector, or a factor outside [0.5, 2].
    """
    if waveform.ndim != 1:
        raise ValueError(f"waveform must be (samples,), not {tuple(waveform.shape)}")
    if not 0.5 <= speed <= 2.0:
        raise ValueError(f"speed must lie between 0.5 and 2, not {speed}")
    ratio = Fraction(speed).limit_denominator(100)
    if ratio == 1 or waveform.shape[0] == 0:
        return waveform.float().clone()
    samples = waveform.detach().cpu().numpy().astype(np.float64)
    faster = signal.resample_poly(samples, ratio.denominator, ratio.numerator)
    return torch.from_numpy(faster.astype(np.float32)).to(waveform.device)

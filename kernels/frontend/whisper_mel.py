"""Whisper's log-mel features, batched.

Source: A. Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", ICML 2023,
section 2.2, and the authors' code (whisper/audio.py): 25 ms Hann windows every 10 ms at 16 kHz,
a filterbank on Slaney's mel scale, each filter of unit area, up to 8 kHz.

    P[t, k] = |STFT(x)[t, k]|^2                            frame t is centred on sample 160 t
    L[t, m] = log10 max(sum_k H[m, k] P[t, k], 1e-10)
    F[t, m] = (max(L[t, m], max L - 8) + 4) / 4            max over the whole utterance

Slaney's scale (M. Slaney, "Auditory Toolbox", 1998) is linear below 1 kHz, 200/3 Hz a mel, and
logarithmic above, 27 mels for a factor of 6.4.

The model reads windows of one length, filled up with silence. Silent frames are all alike, the
floor of the formula above, so `features` stops at the first frame that hears nothing and `window`
repeats it: half a second of speech need not be 30 s on disk.

    B utterances   N samples   T frames   K FFT bins   M mel bins
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FRAME_SHIFT", "SAMPLE_RATE", "features", "longest", "mel_filters", "window"]

SAMPLE_RATE = 16_000
"""Hz."""
FRAME_SHIFT = 160
"""Samples between two frames: 10 ms."""
_FFT = 400  # samples of a frame: 25 ms
_FLOOR = 1e-10
_RANGE = 8.0  # powers of ten below the loudest value


@functools.cache
def mel_filters(bins: int) -> Tensor:
    """The filterbank H (K, M) float32 of `bins` triangles from 0 to 8 kHz.

    Raises ValueError for fewer than one.
    """
    if bins < 1:
        raise ValueError(f"a filterbank needs at least one filter, not {bins}")
    top = 15.0 + 27.0 * math.log(8.0) / math.log(6.4)  # 8 kHz in mels
    feet = _hertz(torch.linspace(0.0, top, bins + 2, dtype=torch.float64))
    points = torch.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = feet[:-2], feet[1:-1], feet[2:]
    rising = (points - left) / (centre - left)
    falling = (right - points) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return (triangles * (2.0 / (right - left))).float()


def _hertz(mels: Tensor) -> Tensor:
    """Slaney's mels as frequencies."""
    above = 1000.0 * torch.exp((mels - 15.0) * (math.log(6.4) / 27.0))
    return torch.where(mels < 15.0, mels * (200.0 / 3.0), above)


def features(waveforms: Sequence[Tensor], mel_bins: int = 80) -> list[Tensor]:
    """The features of utterances, each up to the first frame that hears silence only.

    Args:
        waveforms: B tensors (N,) float in [-1, 1], 16 kHz.
        mel_bins: M; 80, of the large-v3 models 128.

    Returns:
        B tensors (T, M) float32, T = ceil((N + 200) / 160) + 1. What an utterance gives does not
        depend on those beside it.

    Raises:
        ValueError: no utterance, an empty one, or one that is not a vector.
    """
    if not waveforms or any(each.ndim != 1 or len(each) == 0 for each in waveforms):
        raise ValueError("features are made of one or more vectors of samples, none of them empty")
    counts = [math.ceil((len(each) + _FFT // 2) / FRAME_SHIFT) + 1 for each in waveforms]
    # Long enough that the frames which are kept don't reach the mirrored end.
    padded = waveforms[0].new_zeros(len(waveforms), max(counts) * FRAME_SHIFT + _FFT)
    for row, each in zip(padded, waveforms, strict=True):
        row[: len(each)] = each
    hann = torch.hann_window(_FFT, device=padded.device)
    spectrum = torch.stft(padded.float(), _FFT, FRAME_SHIFT, window=hann, return_complex=True)
    power = spectrum.abs().square().transpose(1, 2)
    energies = (power @ mel_filters(mel_bins).to(power.device)).clamp_min(_FLOOR).log10()
    loudest = energies.amax(dim=(1, 2), keepdim=True)
    scaled = (torch.maximum(energies, loudest - _RANGE) + 4.0) / 4.0
    return [row[:count].contiguous() for row, count in zip(scaled, counts, strict=True)]


def longest(frames: int) -> int:
    """Most frames that `features` gives of speech which fits a window of `frames`."""
    return frames + 3  # half a frame beyond the end, and one of silence


def window(features: Tensor, frames: int) -> Tensor:
    """Features (T, M) as the model's input (M, `frames`): what is missing is silence.

    Of an utterance that fills the window, frames at its end are cut off; speech is not, as long as
    the utterance is at most `frames` / 100 seconds long.
    """
    missing = frames - len(features)
    if missing > 0:
        features = torch.cat([features, features[-1:].expand(missing, -1)])
    return features[:frames].T

"""Log-mel filterbank energies ("fbank"), batched.

Source: Kaldi `feat/mel-computations.cc`, `feat/feature-fbank.cc`; values match kaldi-native-fbank
with dither 0.

    mel(f) = 1127 ln(1 + f / 700);  triangles equally spaced and linear *on the mel axis*
    fbank[t, m] = ln max(sum_k H[m, k] |X[t, k]|^2, eps)

    B waveforms   N samples   T frames   K FFT bins   M mel bins
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.frontend.frames import FrameSettings, spectra

__all__ = ["LogMelSettings", "log_mel", "mask_after", "mel_filters"]


@dataclass(frozen=True, kw_only=True)
class LogMelSettings(FrameSettings):
    """Frames plus a mel filterbank. Chapter 9's ECAPA input: 80 bins, hamming window."""

    mel_bins: int = 80
    """M, number of triangular filters."""
    low_frequency: float = 20.0
    """Hz, left foot of the first triangle."""
    high_frequency: float = 7_600.0
    """Hz, right foot of the last triangle; 0 or less counts down from the Nyquist frequency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mel_bins < 3:
            raise ValueError(f"mel_bins must be at least 3, not {self.mel_bins}")
        nyquist = self.sample_rate / 2
        if not 0.0 <= self.low_frequency < self.top_frequency <= nyquist:
            raise ValueError(
                f"low_frequency {self.low_frequency} and high_frequency {self.high_frequency} Hz "
                f"do not fit below the Nyquist frequency of {nyquist} Hz"
            )

    @property
    def top_frequency(self) -> float:
        """Hz, `high_frequency` with "0 or less" resolved."""
        if self.high_frequency > 0:
            return self.high_frequency
        return self.sample_rate / 2 + self.high_frequency


def mel_filters(settings: LogMelSettings, *, device: torch.device | None = None) -> Tensor:
    """The filterbank H^T, (K, M) float32.

    Raises:
        ValueError: when a triangle is so narrow that no FFT bin falls into it.
    """

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    bins = settings.fft_size // 2
    spacing = settings.sample_rate / settings.fft_size
    edges = mel(torch.tensor([settings.low_frequency, settings.top_frequency], dtype=torch.float64))
    feet = torch.linspace(
        float(edges[0]), float(edges[1]), settings.mel_bins + 2, dtype=torch.float64
    )
    left, centre, right = feet[:-2], feet[1:-1], feet[2:]
    points = mel(torch.arange(bins, dtype=torch.float64) * spacing)[:, None]
    rising = (points - left) / (centre - left)
    falling = (right - points) / (right - centre)
    filters = torch.minimum(rising, falling).clamp_min(0.0)
    if bool((filters.sum(0) == 0).any()):
        raise ValueError(
            f"{settings.mel_bins} mel bins are too many for an FFT of {settings.fft_size} points "
            f"at {settings.sample_rate} Hz: a filter is empty; use fewer bins or longer frames"
        )
    return filters.to(device=device, dtype=torch.float32)


def mask_after(features: Tensor, counts: Tensor) -> Tensor:
    """Zero the frames at and beyond each row's count: (B, T, C), (B,) -> (B, T, C)."""
    real = torch.arange(features.shape[1], device=features.device)[None, :] < counts[:, None]
    return torch.where(real[..., None], features, torch.zeros((), device=features.device))


def log_mel(waveforms: Tensor, lengths: Tensor | None, settings: LogMelSettings) -> Tensor:
    """Log-mel energies of a batch of waveforms.

    Args:
        waveforms: (B, N) float, in [-1, 1], right-padded.
        lengths: (B,) int valid samples per row, or None when all are valid.
        settings: see `LogMelSettings`.

    Returns:
        (B, T, M) float32, natural log; rows are zero from their own frame count on
        (`frames.frame_counts`). A padded row equals the same row alone.

    Raises:
        ValueError: wrong shapes or lengths.
    """
    filters = mel_filters(settings, device=waveforms.device)
    blocks, counts = spectra(waveforms, lengths, settings)
    floor = math.log(torch.finfo(torch.float32).eps)
    parts = [(power @ filters).log().clamp_min(floor) for _, power, _ in blocks]
    if not parts:
        return waveforms.new_zeros((waveforms.shape[0], 0, settings.mel_bins), dtype=torch.float32)
    return mask_after(torch.cat(parts, dim=1), counts)

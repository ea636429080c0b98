"""Mel-frequency cepstral coefficients, batched.

Source: Kaldi `feat/feature-mfcc.cc`; values match kaldi-native-fbank with dither 0.

    c[t, j]  = lifter_j sqrt((2 - [j = 0]) / M) sum_m fbank[t, m] cos(pi j (m + 1/2) / M)
    lifter_j = 1 + (Q / 2) sin(pi j / Q)
    c[t, 0] is replaced by the frame's log energy when `use_energy`.

    B waveforms   N samples   T frames   M mel bins   C coefficients
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.frontend.frames import spectra
from goldcrest.kernels.frontend.log_mel import LogMelSettings, mask_after, mel_filters

__all__ = ["MfccSettings", "cosine_transform", "mfcc"]


@dataclass(frozen=True, kw_only=True)
class MfccSettings(LogMelSettings):
    """Kaldi's VoxCeleb i-vector front end by default: 24 coefficients from 30 mel bins."""

    mel_bins: int = 30
    """M, number of triangular filters."""
    coefficients: int = 24
    """C, number of cepstra kept, c0 (or the log energy) included."""
    use_energy: bool = True
    """Replace c0 by the log energy of the frame."""
    lifter: float = 22.0
    """Q of the sinusoidal lifter; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.coefficients <= self.mel_bins:
            raise ValueError(
                f"coefficients must lie between 1 and mel_bins ({self.mel_bins}), "
                f"not {self.coefficients}"
            )
        if self.lifter < 0:
            raise ValueError(f"lifter must be 0 or more, not {self.lifter}")


def cosine_transform(settings: MfccSettings, *, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II with the lifter folded in, (M, C) float32."""
    bins = settings.mel_bins
    j = torch.arange(settings.coefficients, dtype=torch.float64)
    m = torch.arange(bins, dtype=torch.float64)[:, None]
    transform = math.sqrt(2.0 / bins) * torch.cos(math.pi / bins * (m + 0.5) * j)
    transform[:, 0] = math.sqrt(1.0 / bins)
    if settings.lifter:
        transform *= 1 + 0.5 * settings.lifter * torch.sin(math.pi * j / settings.lifter)
    return transform.to(device=device, dtype=torch.float32)


def mfcc(waveforms: Tensor, lengths: Tensor | None, settings: MfccSettings) -> Tensor:
    """MFCC of a batch of waveforms.

    Args:
        waveforms: (B, N) float, in [-1, 1], right-padded.
        lengths: (B,) int valid samples per row, or None when all are valid.
        settings: see `MfccSettings`.

    Returns:
        (B, T, C) float32; rows are zero from their own frame count on (`frames.frame_counts`).
        A padded row equals the same row alone.

    Raises:
        ValueError: wrong shapes or lengths.
    """
    filters = mel_filters(settings, device=waveforms.device)
    transform = cosine_transform(settings, device=waveforms.device)
    blocks, counts = spectra(waveforms, lengths, settings)
    floor = math.log(torch.finfo(torch.float32).eps)
    parts = []
    for _, power, energy in blocks:
        cepstra = (power @ filters).log().clamp_min(floor) @ transform
        if settings.use_energy:
            cepstra[..., 0] = energy
        parts.append(cepstra)
    if not parts:
        empty = (waveforms.shape[0], 0, settings.coefficients)
        return waveforms.new_zeros(empty, dtype=torch.float32)
    return mask_after(torch.cat(parts, dim=1), counts)

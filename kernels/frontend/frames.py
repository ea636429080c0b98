"""Cutting waveforms into windowed frames, and their power spectra, as Kaldi does.

Source: Kaldi `feat/feature-window.cc` (frame placement, reflection, order of the operations).

Per frame, in this order: remove the mean, log energy, pre-emphasis, window, zero-padded FFT.

    B waveforms   N samples (padded)   T frames   W samples per frame   K FFT bins below Nyquist

Waveforms are in [-1, 1]; `sample_scale` brings them to the 16-bit range that Kaldi works in, so
that log energies and the VAD's absolute threshold mean the same as there. Everything is float32:
half precision loses the quiet frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "WINDOWS",
    "FrameSettings",
    "frame_counts",
    "frame_reference",
    "frames_of",
    "spectra",
    "window",
]

WINDOWS = ("povey", "hamming", "hann", "rectangular")

# Frames per block of the spectral work: small enough for the cache, large enough for the FFT.
_BLOCK_FRAMES = 2048


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How a waveform becomes frames."""

    sample_rate: int = 16_000
    """Hz."""
    frame_length: float = 25.0
    """Milliseconds per frame."""
    frame_shift: float = 10.0
    """Milliseconds between the starts of two frames."""
    window: str = "povey"
    """One of `WINDOWS`; povey is Kaldi's default, the ECAPA systems use hamming."""
    preemphasis: float = 0.97
    """x_t - a x_{t-1}; 0 for none."""
    remove_dc: bool = True
    """Subtract each frame's mean first."""
    snip_edges: bool = False
    """True: only frames that lie wholly inside. False: one frame per shift, edges reflected."""
    sample_scale: float = 32_768.0
    """Factor on waveforms in [-1, 1]; 32768 gives Kaldi's 16-bit range."""

    def __post_init__(self) -> None:
        if self.sample_rate <= 0:
            raise ValueError(f"sample_rate must be positive, not {self.sample_rate}")
        if self.shift_samples < 1 or self.frame_samples < 2:
            raise ValueError(
                f"frame_length {self.frame_length} ms and frame_shift {self.frame_shift} ms are "
                f"too short at {self.sample_rate} Hz"
            )
        if self.window not in WINDOWS:
            raise ValueError(f"window '{self.window}' is unknown; choose one of {WINDOWS}")
        if not 0.0 <= self.preemphasis <= 1.0:
            raise ValueError(f"preemphasis must lie in [0, 1], not {self.preemphasis}")
        if self.sample_scale <= 0:
            raise ValueError(f"sample_scale must be positive, not {self.sample_scale}")

    @property
    def frame_samples(self) -> int:
        """W, samples per frame."""
        return int(self.sample_rate * self.frame_length / 1000)

    @property
    def shift_samples(self) -> int:
        """Samples between the starts of two frames."""
        return int(self.sample_rate * self.frame_shift / 1000)

    @property
    def fft_size(self) -> int:
        """The next power of two at or above W."""
        return 1 << (self.frame_samples - 1).bit_length()


def window(settings: FrameSettings, *, device: torch.device | None = None) -> Tensor:
    """The window function, (W,) float32; symmetric, as in Kaldi."""
    samples = settings.frame_samples
    if settings.window == "rectangular":
        return torch.ones(samples, device=device)
    phase = torch.arange(samples, dtype=torch.float64) * (2 * math.pi / (samples - 1))
    if settings.window == "hamming":
        values = 0.54 - 0.46 * torch.cos(phase)
    else:
        values = 0.5 - 0.5 * torch.cos(phase)
        if settings.window == "povey":  # like hamming, but it goes to zero at the edges
            values = values.pow(0.85)
    return values.to(device=device, dtype=torch.float32)


def frame_counts(lengths: Tensor, settings: FrameSettings) -> Tensor:
    """Frames in waveforms of `lengths` samples: (B,) int64 -> (B,) int64, 0 for too short ones."""
    shift, samples = settings.shift_samples, settings.frame_samples
    if settings.snip_edges:
        counts = torch.div(lengths - samples, shift, rounding_mode="floor") + 1
    else:
        counts = torch.div(lengths + shift // 2, shift, rounding_mode="floor")
    return counts.clamp_min(0)


def frames_of(
    waveforms: Tensor, lengths: Tensor | None, settings: FrameSettings
) -> tuple[Tensor, Tensor]:
    """Raw frames and how many of them are real.

    Args:
        waveforms: (B, N) float, right-padded with anything.
        lengths: (B,) int, valid samples per row; None when all N are valid.
        settings: see `FrameSettings`.

    Returns:
        frames (B, T, W) float32, scaled, not windowed (a view: do not write into it), and
        counts (B,) int64. Frames at and beyond a row's count are meaningless.

    Raises:
        ValueError: wrong shapes, or lengths outside [0, N].
    """
    if waveforms.ndim != 2:
        raise ValueError(f"waveforms must be (batch, samples), not {tuple(waveforms.shape)}")
    batch, samples = waveforms.shape
    if lengths is None:
        lengths = torch.full((batch,), samples, dtype=torch.long, device=waveforms.device)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be ({batch},), not {tuple(lengths.shape)}")
    if batch and (int(lengths.max()) > samples or int(lengths.min()) < 0):
        raise ValueError(f"lengths must lie between 0 and the {samples} samples of the batch")
    lengths = lengths.to(device=waveforms.device, dtype=torch.long)
    counts = frame_counts(lengths, settings)
    frames = int(counts.max()) if batch else 0
    span = (frames - 1) * settings.shift_samples + settings.frame_samples
    if frames == 0:
        return waveforms.new_zeros((batch, 0, settings.frame_samples)), counts
    start = 0
    if not settings.snip_edges:  # frame t is centred in the middle of shift t
        start = settings.shift_samples // 2 - settings.frame_samples // 2
    position = torch.arange(start, start + span, device=waveforms.device)
    # Reflection about both edges, repeated as often as needed, is a triangle wave of period 2n.
    n = lengths.clamp_min(1)[:, None]
    folded = torch.remainder(position[None, :], 2 * n)
    folded = torch.where(folded >= n, 2 * n - 1 - folded, folded)
    extended = waveforms.float().gather(1, folded) * settings.sample_scale
    return extended.unfold(1, settings.frame_samples, settings.shift_samples), counts


def spectra(
    waveforms: Tensor, lengths: Tensor | None, settings: FrameSettings
) -> tuple[Iterator[tuple[slice, Tensor, Tensor]], Tensor]:
    """Power spectra and log energies, block by block of frames.

    Returns an iterator of (frame slice, power (B, t, K), log energy (B, t)) with K = fft_size / 2
    bins (Nyquist left out, as in Kaldi), and the counts (B,) of real frames. The energy is that of
    the frame before pre-emphasis and windowing, floored at float32 epsilon before the log.
    """
    frames, counts = frames_of(waveforms, lengths, settings)
    taper = window(settings, device=waveforms.device)
    step = max(1, _BLOCK_FRAMES // max(1, frames.shape[0]))

    def blocks() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, frames.shape[1], step):
            part = slice(start, min(start + step, frames.shape[1]))
            block = frames[:, part]
            if settings.remove_dc:
                block = block - block.mean(dim=-1, keepdim=True)
            energy = block.square().sum(-1).clamp_min(torch.finfo(torch.float32).eps).log()
            if settings.preemphasis:
                before = torch.cat([block[..., :1], block[..., :-1]], dim=-1)
                block = block - settings.preemphasis * before
            spectrum = torch.fft.rfft(block * taper, n=settings.fft_size)[..., :-1]
            yield part, spectrum.real.square() + spectrum.imag.square(), energy

    return blocks(), counts


def frame_reference(waveform: Tensor, settings: FrameSettings) -> Tensor:
    """Plain twin of `frames_of` for one waveform: (N,) -> (T, W), sample by sample."""
    samples = waveform.shape[0]
    count = int(frame_counts(torch.tensor([samples]), settings)[0])
    rows = torch.zeros(count, settings.frame_samples)
    for t in range(count):
        start = t * settings.shift_samples
        if not settings.snip_edges:
            start += settings.shift_samples // 2 - settings.frame_samples // 2
        for k in range(settings.frame_samples):
            s = start + k
            while s < 0 or s >= samples:
                s = -s - 1 if s < 0 else 2 * samples - 1 - s
            rows[t, k] = waveform[s] * settings.sample_scale
    return rows

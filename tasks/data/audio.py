"""Reading audio files: header first, then samples as 16 kHz mono float32.

Everything that can be wrong with one file raises `AudioError` with a reason in words, so that the
caller can put the file into quarantine and go on.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"})
SAMPLE_RATE = 16_000
SILENCE_PEAK = 1e-4  # -80 dBFS: below the quantisation noise of 13-bit audio


class AudioError(Exception):
    """One audio file can't be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class AudioLimits:
    """What a file may claim in its header before it is decoded."""

    min_rate: int = 4_000  # Hz
    max_rate: int = 192_000  # Hz
    max_channels: int = 32
    max_seconds: float = 6 * 3600.0
    min_seconds: float = 0.1


@dataclass(frozen=True)
class Header:
    """What an audio file says of itself: `rate` in Hz, `seconds` of duration."""

    rate: int
    channels: int
    seconds: float


def read_header(source: Path | bytes, limits: AudioLimits | None = None) -> Header:
    """The header of a file (path or bytes), checked against `limits`; AudioError if unusable."""
    limits = limits or AudioLimits()
    if isinstance(source, Path):
        try:
            if not source.is_file():
                raise AudioError("the file does not exist")
            if source.stat().st_size == 0:
                raise AudioError("the file is empty (0 bytes)")
        except PermissionError as error:  # any other may pass: the step is tried again
            raise AudioError("the file can't be read: permission denied") from error
    elif not source:
        raise AudioError("the audio is empty (0 bytes)")
    try:
        info = soundfile.info(_open(source))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"not a readable audio file: {_reason(error)}") from error
    if not limits.min_rate <= info.samplerate <= limits.max_rate:
        raise AudioError(
            f"sample rate {info.samplerate} Hz is outside {limits.min_rate}-{limits.max_rate} Hz"
        )
    if not 1 <= info.channels <= limits.max_channels:
        raise AudioError(f"{info.channels} channels; at most {limits.max_channels} are read")
    seconds = info.frames / info.samplerate
    if info.frames <= 0:
        raise AudioError("the file has a header but no samples")
    if seconds < limits.min_seconds:
        raise AudioError(f"{seconds:.3f} s is shorter than {limits.min_seconds} s")
    if seconds > limits.max_seconds:
        raise AudioError(f"{seconds:.0f} s is longer than {limits.max_seconds:.0f} s")
    return Header(info.samplerate, info.channels, seconds)


def decode(source: Path | bytes, limits: AudioLimits | None = None) -> np.ndarray:
    """All samples of a file as (N,) float32, 16 kHz mono, nominally in [-1, 1].

    Channels are averaged. AudioError when the file is unreadable, truncated, silent, or holds
    samples that are not finite.
    """
    header = read_header(source, limits)
    try:
        samples, rate = soundfile.read(_open(source), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"damaged audio: {_reason(error)}") from error
    expected = round(header.seconds * rate)
    if len(samples) < 0.98 * expected:
        raise AudioError(f"truncated: {len(samples)} of {expected} samples could be read")
    return condition(samples, rate)


def condition(samples: np.ndarray, rate: int) -> np.ndarray:
    """Channels to mono and any rate to 16 kHz: (N, channels) or (N,) -> (M,) float32."""
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    mono = mono.astype(np.float32, copy=False)
    if not np.isfinite(mono).all():
        raise AudioError("holds samples that are NaN or infinite")
    if mono.size == 0 or float(np.abs(mono).max()) < SILENCE_PEAK:
        raise AudioError("silent: no sample above -80 dBFS")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ").astype(np.float32, copy=False)
    return mono


def _open(source: Path | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def _reason(error: Exception) -> str:
    return str(error).rsplit(": ", maxsplit=1)[-1].rstrip(".") or type(error).__name__


def to_pcm16(samples: np.ndarray) -> bytes:
    """(N,) float32 -> little-endian 16-bit PCM; louder than full scale is scaled, not clipped."""
    peak = float(np.abs(samples).max(initial=0.0))
    scaled = samples / peak if peak > 1.0 else samples
    return np.round(scaled * 32767.0).astype("<i2").tobytes()


def from_pcm16(data: bytes | memoryview) -> np.ndarray:
    """Little-endian 16-bit PCM -> (N,) float32 in [-1, 1]."""
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / 32767.0

"""Reading audio files: header first, then samples as 16 kHz mono float32, block by block.

Only the mono signal at 16 kHz is ever held as a whole, so a file of many channels and a high rate
needs no more memory than another of its length. Everything that can be wrong with one file raises
`AudioError` with a reason in words, so that the caller can put it into quarantine and go on.
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
_BLOCK = 1 << 18  # samples over all channels that are decoded at once
SILENCE_PEAK = 1e-4  # -80 dBFS: below the quantisation noise of 13-bit audio
LOUDEST_PEAK = 2.0**31
"""Full scale of 32-bit integers that were stored as floats unscaled. Spectra square what they read:
from 2**42 on, features in float32 overflow."""


class AudioError(Exception):
    """One audio file can't be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class AudioLimits:
    """What a file may claim in its header before it is decoded."""

    min_rate: int = 4_000  # Hz
    max_rate: int = 192_000  # Hz
    max_channels: int = 32
    max_seconds: float = 6 * 3600.0
    max_samples: int = 1 << 31  # over all channels: 6 h of stereo at 48 kHz
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
        raise AudioError(f"{seconds:.2f} s is longer than {limits.max_seconds:g} s")
    if info.frames * info.channels > limits.max_samples:
        raise AudioError(
            f"{info.frames} samples in {info.channels} channels; at most {limits.max_samples} "
            "over all channels are decoded"
        )
    return Header(info.samplerate, info.channels, seconds)


def decode(source: Path | bytes, limits: AudioLimits | None = None) -> np.ndarray:
    """All samples of a file as (N,) float32, 16 kHz mono, nominally in [-1, 1].

    Channels are averaged. AudioError when the file is unreadable, truncated, silent, too large for
    this machine's memory, or holds samples that are not finite or absurdly large.
    """
    header = read_header(source, limits)
    conditioner = _Conditioner(header.rate)
    try:
        with _Forward(_open(source)) as file:
            left = file.frames
            while left > 0 and len(block := file.block(min(left, _BLOCK // header.channels))):
                conditioner.take(block)
                left -= len(block)
            if left > 0.02 * file.frames:
                read = file.frames - left
                raise AudioError(f"truncated: {read} of {file.frames} samples could be read")
        return conditioner.result()
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"damaged audio: {_reason(error)}") from error
    except MemoryError as error:
        raise AudioError(f"its {header.seconds:.0f} s don't fit into memory") from error


class _Forward(soundfile.SoundFile):
    """A file that is read from its start to its end.

    soundfile seeks after every block of a file that can seek, and an MP3 decoder does not come back
    from that bit for bit. One that reads a whole file at once seeks to its start, so this does too.
    """

    def __init__(self, source: str | io.BytesIO) -> None:
        super().__init__(source)
        if super().seekable():
            self.seek(0)

    def seekable(self) -> bool:
        """No."""
        return False

    def block(self, frames: int) -> np.ndarray:
        """At most the next `frames` samples of all channels, (N, channels) float32."""
        block: np.ndarray = self.read(frames, dtype="float32", always_2d=True)
        return block


def condition(samples: np.ndarray, rate: int) -> np.ndarray:
    """Channels to mono and any rate to 16 kHz: (N, channels) or (N,) -> (M,) float32."""
    conditioner = _Conditioner(rate)
    conditioner.take(samples)
    return conditioner.result()


class _Conditioner:
    """Channels to mono and any rate to 16 kHz; the result does not depend on how the signal is cut
    into blocks."""

    def __init__(self, rate: int) -> None:
        self._resampler = None
        if rate != SAMPLE_RATE:
            self._resampler = soxr.ResampleStream(
                rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ"
            )
        self._parts: list[np.ndarray] = []
        self._peak = 0.0

    def take(self, samples: np.ndarray) -> None:
        """The next block, (N, channels) or (N,)."""
        mono = samples.mean(axis=1) if samples.ndim == 2 else samples
        mono = mono.astype(np.float32, copy=False)
        if not np.isfinite(mono).all():
            raise AudioError("holds samples that are NaN or infinite")
        self._peak = max(self._peak, float(np.abs(mono).max(initial=0.0)))
        if self._peak > LOUDEST_PEAK:
            raise AudioError(f"holds samples as large as {self._peak:.3g}; full scale is 1")
        self._parts.append(self._resampled(mono))

    def result(self) -> np.ndarray:
        """The whole signal (M,) float32, after the last block."""
        if self._peak < SILENCE_PEAK:
            raise AudioError("silent: no sample above -80 dBFS")
        if self._resampler is not None:
            self._parts.append(self._resampled(np.zeros(0, np.float32), last=True))
        return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)

    def _resampled(self, mono: np.ndarray, *, last: bool = False) -> np.ndarray:
        if self._resampler is None:
            return mono
        resampled: np.ndarray = self._resampler.resample_chunk(
            np.ascontiguousarray(mono), last=last
        )
        return resampled


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

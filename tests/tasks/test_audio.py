"""Decoding: every format that soundfile writes, every way a file can be bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.tasks.data.audio import (
    AudioError,
    AudioLimits,
    condition,
    decode,
    from_pcm16,
    read_header,
    to_pcm16,
)

RATE = 16_000


def tone(seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (48_000, 2)])
def test_every_format_becomes_16_khz_mono(
    tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, tone(1.0, rate, channels), rate)
    samples = decode(path)
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(RATE, rel=0.1)  # MP3 pads
    peak = np.abs(np.fft.rfft(samples[2000:-2000])).argmax() * RATE / len(samples[2000:-2000])
    assert peak == pytest.approx(440, abs=2)


def test_eight_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "eight.wav"
    soundfile.write(path, tone(0.5, channels=8), RATE)
    assert decode(path) == pytest.approx(decode_mono := tone(0.5)[:, 0], abs=2e-4)
    assert read_header(path).channels == 8
    assert len(decode_mono) == RATE // 2


def test_audio_in_memory_equals_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tone.flac"
    soundfile.write(path, tone(), RATE)
    assert np.array_equal(decode(path), decode(path.read_bytes()))


def test_a_mislabelled_file_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "really_flac.wav"
    soundfile.write(path, tone(), RATE, format="FLAC")
    assert len(decode(path)) == RATE


def _bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.wav"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not audio")
    elif kind == "header":
        soundfile.write(path, np.zeros((0, 1), np.float32), RATE)
    elif kind == "silent":
        soundfile.write(path, np.zeros(RATE, np.float32), RATE)
    elif kind == "nan":
        samples = tone()
        samples[100] = np.nan
        soundfile.write(path, samples, RATE, subtype="FLOAT")
    elif kind == "truncated":
        path = tmp_path / "bad.flac"
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, RATE), RATE)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "short":
        soundfile.write(path, tone(0.01), RATE)
    elif kind == "rate":
        soundfile.write(path, tone(1.0, 1_000), 1_000)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("empty", "0 bytes"),
        ("text", "not a readable audio file"),
        ("header", "no samples"),
        ("silent", "silent"),
        ("nan", "NaN"),
        ("truncated", "damaged|truncated"),
        ("short", "shorter than"),
        ("rate", "sample rate 1000 Hz"),
    ],
)
def test_what_is_wrong_is_said_in_words(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        decode(_bad(tmp_path, kind))


def test_limits_are_checked_on_the_header(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(2.0, channels=2), RATE)
    with pytest.raises(AudioError, match="longer than"):
        read_header(path, AudioLimits(max_seconds=1.0))
    with pytest.raises(AudioError, match="2 channels"):
        read_header(path, AudioLimits(max_channels=1))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_pcm_keeps_samples_to_half_a_step(values: list[float]) -> None:
    samples = np.array(values, np.float32)
    assert np.abs(from_pcm16(to_pcm16(samples)) - samples).max() <= 0.51 / 32767


def test_pcm_scales_what_is_louder_than_full_scale() -> None:
    assert from_pcm16(to_pcm16(np.array([2.0, -1.0], np.float32))) == pytest.approx(
        [1, -0.5], abs=1e-4
    )


def test_resampling_keeps_the_level() -> None:
    assert np.abs(condition(tone(1.0, 44_100), 44_100)).max() == pytest.approx(0.3, abs=0.01)

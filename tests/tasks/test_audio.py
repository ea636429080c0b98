"""Decoding: every format that soundfile writes, every way a file can be bad."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.tasks.data import audio
from goldcrest.tasks.data.audio import (
    AudioError,
    AudioLimits,
    condition,
    decode,
    from_pcm16,
    read_header,
    to_pcm16,
)
from goldcrest.tasks.speaker.frontend import FrontEnd, FrontEndConfig

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


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"),
        ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"), ("AU", "ULAW"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (48_000, 3)])
def test_blocks_are_decoded_to_the_bytes_of_the_whole(
    kind: str, subtype: str, rate: int, channels: int
) -> None:
    """Expected: what soundfile and soxr make of the file at once, as releases before did."""
    rng = np.random.default_rng(0)
    samples = 0.2 * rng.standard_normal((rate * 40 + 1, channels))
    data = io.BytesIO()
    try:
        soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    except soundfile.LibsndfileError:
        pytest.skip("the format has no such rate or channels")
    whole, _ = soundfile.read(io.BytesIO(data.getvalue()), dtype="float32", always_2d=True)
    mono = whole.mean(axis=1)
    expected = mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="HQ")
    assert len(whole) * channels > audio._BLOCK
    assert np.array_equal(decode(data.getvalue()), expected)
    assert np.array_equal(condition(whole, rate), expected)


@settings(deadline=None, max_examples=30)
@given(
    rate=st.sampled_from([4_000, 11_025, 16_000, 22_050, 44_100, 192_000]),
    length=st.integers(1, 30_000),
    cuts=st.lists(st.integers(0, 30_000), max_size=6),
)
def test_the_cut_into_blocks_changes_nothing(rate: int, length: int, cuts: list[int]) -> None:
    samples = np.random.default_rng(length).uniform(-1, 1, (length, 3)).astype(np.float32)
    conditioner = audio._Conditioner(rate)
    for block in np.split(samples, sorted(cuts)):
        conditioner.take(block)
    assert np.array_equal(conditioner.result(), condition(samples, rate))


def test_memory_is_for_the_mono_signal_alone(tmp_path: Path) -> None:
    """8 channels of 4 minutes are 123 MB of float32, the mono signal is 15 MB."""
    path = tmp_path / "wide.flac"
    with soundfile.SoundFile(path, "w", RATE, 8, "PCM_16") as file:
        for _ in range(4 * 60):
            file.write(np.full((RATE, 8), 5_000, np.int16))
    tracemalloc.start()
    try:
        samples = decode(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 4 * 60 * RATE
    assert peak < 3 * samples.nbytes


def test_a_signal_that_does_not_fit_into_memory_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(), RATE)

    def refuse(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(audio._Conditioner, "take", refuse)
    with pytest.raises(AudioError, match="its 1 s don't fit into memory"):
        decode(path)


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
    elif kind == "huge":
        soundfile.write(path, 1e25 * tone(), RATE, subtype="FLOAT")
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
        ("huge", r"samples as large as 3e\+24; full scale is 1"),
        ("truncated", "damaged|truncated"),
        ("short", "shorter than"),
        ("rate", "sample rate 1000 Hz"),
    ],
)
def test_what_is_wrong_is_said_in_words(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        decode(_bad(tmp_path, kind))


def test_integers_that_were_stored_as_floats_are_read(tmp_path: Path) -> None:
    """The loudest samples that pass still have features."""
    path = tmp_path / "integers.wav"
    square = np.sign(tone()[1:]) * np.float32(audio.LOUDEST_PEAK)
    soundfile.write(path, square, RATE, subtype="FLOAT")
    front_end = FrontEnd(FrontEndConfig())
    samples = decode(path)
    assert np.isfinite(front_end.fbank(samples)).all()
    assert np.isfinite(front_end.mfcc(samples)).all()


def test_limits_are_checked_on_the_header(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(2.0, channels=2), RATE)
    with pytest.raises(AudioError, match="longer than"):
        read_header(path, AudioLimits(max_seconds=1.0))
    with pytest.raises(AudioError, match="2 channels"):
        read_header(path, AudioLimits(max_channels=1))
    with pytest.raises(AudioError, match="32000 samples in 2 channels; at most 63999"):
        decode(path, AudioLimits(max_samples=63_999))


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

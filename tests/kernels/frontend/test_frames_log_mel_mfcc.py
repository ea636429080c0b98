"""Frames, log-mel filterbanks and MFCC against kaldi-native-fbank and against plain loops."""

from __future__ import annotations

import dataclasses

import kaldi_native_fbank as knf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.frontend.frames import (
    FrameSettings,
    frame_counts,
    frame_reference,
    frames_of,
    window,
)
from goldcrest.kernels.frontend.log_mel import LogMelSettings, log_mel, mel_filters
from goldcrest.kernels.frontend.mfcc import MfccSettings, mfcc


def speech_like(samples: int, seed: int = 0) -> torch.Tensor:
    """A harmonic tone with vibrato, a loudness contour and a little noise, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(5 * t)) / 16_000
    tone = sum(np.sin(k * pitch) / k for k in range(1, 20))
    loud = 0.2 + 0.2 * np.sin(9 * t) ** 2
    wave = 0.3 * loud * tone + 0.003 * rng.standard_normal(samples) + 0.01
    return torch.from_numpy(wave.astype(np.float32))


def kaldi_options(options, cfg: FrameSettings):
    options.frame_opts.samp_freq = cfg.sample_rate
    options.frame_opts.dither = 0.0
    options.frame_opts.frame_length_ms = cfg.frame_length
    options.frame_opts.frame_shift_ms = cfg.frame_shift
    options.frame_opts.window_type = {"hann": "hanning"}.get(cfg.window, cfg.window)
    options.frame_opts.snip_edges = cfg.snip_edges
    options.frame_opts.preemph_coeff = cfg.preemphasis
    options.frame_opts.remove_dc_offset = cfg.remove_dc
    options.mel_opts.num_bins = cfg.mel_bins
    options.mel_opts.low_freq = cfg.low_frequency
    options.mel_opts.high_freq = cfg.high_frequency
    return options


def kaldi_features(computer, waveform: torch.Tensor, cfg: FrameSettings) -> np.ndarray:
    computer.accept_waveform(cfg.sample_rate, (waveform * cfg.sample_scale).tolist())
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


@pytest.mark.parametrize("window_name", ["povey", "hamming", "hann"])
@pytest.mark.parametrize("snip_edges", [False, True])
def test_log_mel_matches_kaldi_native_fbank(window_name: str, snip_edges: bool) -> None:
    cfg = LogMelSettings(window=window_name, snip_edges=snip_edges, mel_bins=40)
    wave = speech_like(16_123)
    expected = kaldi_features(knf.OnlineFbank(kaldi_options(knf.FbankOptions(), cfg)), wave, cfg)
    found = log_mel(wave[None], None, cfg)[0].numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("use_energy", [False, True])
@pytest.mark.parametrize("samples", [16_000, 4_777, 300])
def test_mfcc_matches_kaldi_native_fbank(use_energy: bool, samples: int) -> None:
    cfg = MfccSettings(use_energy=use_energy)
    options = kaldi_options(knf.MfccOptions(), cfg)
    options.num_ceps, options.use_energy = cfg.coefficients, use_energy
    options.cepstral_lifter = cfg.lifter
    wave = speech_like(samples, seed=3)
    expected = kaldi_features(knf.OnlineMfcc(options), wave, cfg)
    found = mfcc(wave[None], None, cfg)[0].numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=3e-3)


@pytest.mark.parametrize("front_end", [mfcc, log_mel])
def test_padded_equals_unpadded(front_end) -> None:
    cfg = MfccSettings() if front_end is mfcc else LogMelSettings()
    lengths = [9_000, 16_000, 150, 79, 0]
    waves = [speech_like(n, seed=n) for n in lengths]
    batch = torch.full((len(lengths), 16_000), float("nan"))  # padding may hold anything
    for row, wave in zip(batch, waves, strict=True):
        row[: wave.shape[0]] = wave
    together = front_end(batch, torch.tensor(lengths), cfg)
    counts = frame_counts(torch.tensor(lengths), cfg)
    assert counts.tolist() == [56, 100, 1, 0, 0]  # (n + 80) // 160
    for row, wave, count in zip(together, waves, counts.tolist(), strict=True):
        alone = front_end(wave[None], None, cfg)[0]
        assert alone.shape[0] == count
        torch.testing.assert_close(row[:count], alone, atol=1e-4, rtol=1e-4)
        assert not row[count:].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 900), st.booleans(), st.sampled_from([(25.0, 10.0), (20.0, 7.5), (9.1, 9.1)]))
def test_frames_equal_the_plain_twin(samples: int, snip: bool, spans: tuple[float, float]) -> None:
    cfg = FrameSettings(
        sample_rate=4_000, frame_length=spans[0], frame_shift=spans[1], snip_edges=snip
    )
    wave = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    frames, counts = frames_of(wave[None], None, cfg)
    expected = frame_reference(wave, cfg)
    assert int(counts[0]) == expected.shape[0]
    assert torch.equal(frames[0], expected)


def test_digital_silence_is_finite() -> None:
    found = mfcc(torch.zeros(1, 8_000), None, MfccSettings())
    assert torch.isfinite(found).all()


def test_mel_filters_peak_at_one_or_less_and_cover_the_band() -> None:
    filters = mel_filters(LogMelSettings(mel_bins=30))
    assert filters.shape == (256, 30)
    assert float(filters.max()) <= 1.0
    # Neighbouring triangles sum to one between the first and the last centre.
    first, last = int(filters[:, 0].argmax()) + 1, int(filters[:, -1].argmax())
    torch.testing.assert_close(filters[first:last].sum(1), torch.ones(last - first))


def test_hamming_window_ends_at_eight_percent() -> None:
    # 0.54 - 0.46, the textbook end value of the hamming window.
    assert float(window(FrameSettings(window="hamming"))[0]) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("cls", "wrong", "word"),
    [
        (FrameSettings, {"sample_rate": 0}, "sample_rate"),
        (FrameSettings, {"frame_shift": 0.0}, "frame_shift"),
        (FrameSettings, {"window": "kaiser"}, "povey"),
        (FrameSettings, {"preemphasis": 1.5}, "preemphasis"),
        (FrameSettings, {"sample_scale": 0.0}, "sample_scale"),
        (LogMelSettings, {"mel_bins": 2}, "mel_bins"),
        (LogMelSettings, {"high_frequency": 9_000.0}, "Nyquist"),
        (MfccSettings, {"coefficients": 31}, "coefficients"),
        (MfccSettings, {"lifter": -1.0}, "lifter"),
    ],
)
def test_wrong_settings_are_named(cls, wrong: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        cls(**wrong)


def test_wrong_inputs_are_named() -> None:
    cfg = MfccSettings()
    with pytest.raises(ValueError, match="batch, samples"):
        mfcc(torch.zeros(100), None, cfg)
    with pytest.raises(ValueError, match="lengths"):
        mfcc(torch.zeros(2, 100), torch.tensor([100]), cfg)
    with pytest.raises(ValueError, match="lengths"):
        mfcc(torch.zeros(1, 100), torch.tensor([101]), cfg)
    with pytest.raises(ValueError, match="mel bins are too many"):
        mel_filters(dataclasses.replace(LogMelSettings(), mel_bins=200))

"""Whisper's features against the extractor of the transformers library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from goldcrest.kernels.frontend import whisper_mel


def utterance(seconds: float, seed: int) -> torch.Tensor:
    """Tones that come and go over a little noise, and a stretch of digital silence."""
    generator = torch.Generator().manual_seed(seed)
    count = round(seconds * whisper_mel.SAMPLE_RATE)
    time = torch.arange(count) / whisper_mel.SAMPLE_RATE
    wave = 0.3 * torch.sin(2 * np.pi * (200 + 300 * seed) * time) * torch.sin(9 * time).abs()
    wave += 0.01 * torch.randn(count, generator=generator)
    wave[count // 3 : count // 2] = 0
    return wave


def theirs(wave: torch.Tensor, seconds: int, bins: int) -> np.ndarray:
    """(M, T) of the library, filled up to `seconds`."""
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    made = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="np")
    return np.asarray(made["input_features"][0])


@pytest.mark.parametrize("bins", [80, 128])
def test_the_filterbank_is_the_librarys(bins: int) -> None:
    expected = WhisperFeatureExtractor(feature_size=bins).mel_filters
    assert whisper_mel.mel_filters(bins).numpy() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("bins", "seconds"), [(80, 2), (128, 2), (80, 30)])
def test_features_are_the_librarys(bins: int, seconds: int) -> None:
    """Of utterances of any length, side by side; 1e-5 is the library's own promise."""
    lengths = (0.3, 1.234, 1.98) if seconds == 2 else (1.234,)
    waves = [utterance(length, seed) for seed, length in enumerate(lengths)]
    found = whisper_mel.features(waves, bins)
    for wave, rows in zip(waves, found, strict=True):
        made = whisper_mel.window(rows, 100 * seconds).numpy()
        assert made.shape == (bins, 100 * seconds)
        assert made == pytest.approx(theirs(wave, seconds, bins), abs=2e-5)


def test_an_utterance_that_fills_the_window_differs_in_its_last_frames_alone() -> None:
    """There the library mirrors the signal, here silence follows."""
    wave = utterance(2.0, 1)
    made = whisper_mel.window(whisper_mel.features([wave])[0], 200).numpy()
    expected = theirs(wave, 2, 80)
    assert made[:, :198] == pytest.approx(expected[:, :198], abs=2e-5)


def test_the_last_frame_is_silence_and_neighbours_do_not_matter() -> None:
    waves = [utterance(0.7, 3), utterance(2.0, 4)]
    alone = whisper_mel.features(waves[:1])[0]
    beside = whisper_mel.features(waves)[0]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)
    assert bool((alone[-1] == alone.min()).all())
    assert len(alone) == 73  # ceil((11200 + 200) / 160) + 1


def test_what_is_no_utterance_is_refused() -> None:
    with pytest.raises(ValueError, match="none of them empty"):
        whisper_mel.features([])
    with pytest.raises(ValueError, match="none of them empty"):
        whisper_mel.features([torch.zeros(0)])
    with pytest.raises(ValueError, match="at least one filter"):
        whisper_mel.mel_filters(0)

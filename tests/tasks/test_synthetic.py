"""The embedded corpus: same seed, same samples, in whatever order voices are made."""

from __future__ import annotations

import ctypes

import espeakng_loader
import numpy as np

from goldcrest.tasks.data.synthetic import ACCENTS, make_voices, sentence, synthesize


def test_a_voice_depends_on_its_settings_alone() -> None:
    """Also where somebody else (the doctor does) holds the library, so that it stays loaded."""
    held = ctypes.CDLL(espeakng_loader.get_library_path())
    assert held.espeak_Initialize
    first, other = make_voices(2, seed=3)
    alone = [spoken.samples for spoken in synthesize(first, 2, seed=3)]
    for _ in synthesize(other, 1, seed=3):
        pass
    again = [spoken.samples for spoken in synthesize(first, 2, seed=3)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))


def test_every_accent_and_variant_speaks() -> None:
    voices = make_voices(60, seed=0)
    assert len({v.name for v in voices}) == 60
    assert {v.accent for v in voices} == set(ACCENTS)
    for made in voices[:52]:
        (spoken,) = synthesize(made, 1, seed=0)
        assert 0.8 < len(spoken.samples) / 16_000 < 8.0
        assert 0.005 < float(np.sqrt(np.mean(spoken.samples**2))) < 0.5


def test_speakers_differ_more_than_their_utterances() -> None:
    def spectrum(samples: np.ndarray) -> np.ndarray:
        frames = np.abs(np.fft.rfft(samples[: len(samples) // 400 * 400].reshape(-1, 400)))
        return np.log(frames.mean(0) + 1e-3)

    voices = make_voices(6, seed=1)
    mean = [np.stack([spectrum(s.samples) for s in synthesize(v, 4, seed=1)]) for v in voices]
    within = np.mean([group.std(0).mean() for group in mean])
    between = np.stack([group.mean(0) for group in mean]).std(0).mean()
    assert between > 0.3 * within


def test_sentences_vary() -> None:
    rng = np.random.default_rng(0)
    assert len({sentence(rng) for _ in range(200)}) > 190

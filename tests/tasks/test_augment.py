"""Corrupted copies: what they are drawn from, and that the draw is nobody else's business."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from goldcrest.cluster.api import StepError
from goldcrest.tasks.speaker.augment import AugmentConfig, NoiseBank, corrupt, load_noise_bank
from tests.tasks.conftest import voice

SPEECH = voice(120.0, 1.5, seed=1)


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    """A corpus of one noise, one room, and one file that is no audio."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "hiss.wav", 0.1 * rng.standard_normal(40_000), 16_000)
    room = np.zeros(800)
    room[[0, 400]] = 1.0, 0.5
    soundfile.write(tmp_path / "room.wav", room, 16_000, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows = [
        {"file_name": "hiss.wav", "kind": "noise"},
        {"file_name": "room.wav", "kind": "rir"},
        {"file_name": "broken.wav", "kind": "noise"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_noise_corpus_is_listed_and_opened_when_drawn(noises: Path) -> None:
    cfg = AugmentConfig(copies=1, kinds=("noise",), noise_paths=(str(noises),), noise_snr=(5, 5))
    bank = load_noise_bank(cfg, [])
    assert (bank.noises, bank.rooms, bank.left_out) == (
        [noises / "hiss.wav"],
        [noises / "room.wav"],
        1,
    )
    noisy = corrupt(SPEECH, "a", 1, cfg, bank, seed=0)
    added = noisy - SPEECH
    assert 10 * np.log10((SPEECH**2).mean() / (added**2).mean()) == pytest.approx(5, abs=0.1)
    (noises / "hiss.wav").unlink()
    fresh = NoiseBank([noises / "gone.wav"], [], [])
    with pytest.raises(StepError, match=r"gone\.wav"):
        corrupt(SPEECH, "a", 1, cfg, fresh, seed=0)


def test_a_room_is_the_one_of_the_corpus(noises: Path) -> None:
    cfg = AugmentConfig(copies=1, kinds=("reverb",), noise_paths=(str(noises),))
    wet = corrupt(SPEECH, "a", 1, cfg, load_noise_bank(cfg, []), seed=0)
    expected = SPEECH + 0.5 * np.concatenate([np.zeros(400, np.float32), SPEECH[:-400]])
    scale = float(np.dot(wet[: len(SPEECH)], expected) / np.dot(expected, expected))
    assert np.allclose(wet[: len(SPEECH)], scale * expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["noise", "reverb", "babble", "speed"])
def test_the_draw_depends_on_seed_utterance_and_copy_alone(kind: str) -> None:
    cfg = AugmentConfig(copies=2, kinds=(kind,))  # type: ignore[arg-type]
    voices = [(f"s{n}", voice(100.0 + 20 * n, 1.0, seed=n)) for n in range(6)]
    bank = NoiseBank([], [], voices)
    first = corrupt(SPEECH, "a", 1, cfg, bank, seed=0)
    assert np.array_equal(first, corrupt(SPEECH, "a", 1, cfg, bank, seed=0))
    for changed in (("b", 1, 0), ("a", 2, 0), ("a", 1, 1)):
        utterance, copy, seed = changed
        other = corrupt(SPEECH, utterance, copy, cfg, bank, seed=seed)
        assert other.shape != first.shape or not np.allclose(other, first)
    assert np.isfinite(first).all()
    assert np.abs(first).max() <= 1.0


def test_babble_is_of_others() -> None:
    bank = NoiseBank([], [], [("me", SPEECH), ("you", SPEECH[::-1].copy())])
    assert [who for who, _ in bank.without("me").voices] == ["you"]

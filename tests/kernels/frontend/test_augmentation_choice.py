"""The random choice among augmentations: kinds, fall-backs, seeding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from goldcrest.kernels.frontend.augmentation import (
    KINDS,
    AugmentationSettings,
    AugmentationSources,
    augment,
    drawable_kinds,
)
from goldcrest.kernels.frontend.noise import power_db, white_noise

SPEECH = 0.1 * white_noise(3_200, np.random.default_rng(0))
VOICES = [0.1 * white_noise(2_000 + 700 * i, np.random.default_rng(i)) for i in range(3)]
ALL = AugmentationSources(noises=VOICES, voices=VOICES, music=VOICES, rirs=[torch.ones(5)])


def test_all_kinds_are_drawn_about_equally() -> None:
    cfg = AugmentationSettings(kinds=KINDS)
    rng = np.random.default_rng(1)
    drawn = [augment(SPEECH, ALL, cfg, rng) for _ in range(350)]
    counts = Counter(kind for _, kind in drawn)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 25  # 50 expected of each, 7 standard deviations below is 4
    for wave, kind in drawn:
        assert wave.dtype == torch.float32
        assert torch.isfinite(wave).all()
        assert kind == "speed" or wave.shape == SPEECH.shape


@pytest.mark.parametrize(("kind", "low", "high"), [("noise", 0, 15), ("babble", 13, 20)])
def test_snr_lies_in_the_range_of_its_kind(kind: str, low: float, high: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        wave, _ = augment(SPEECH, ALL, AugmentationSettings(kinds=(kind,)), rng)
        snr = power_db(SPEECH) - power_db(wave - SPEECH)
        assert low - 0.1 <= snr <= high + 0.1


def test_without_recordings_only_what_can_be_made_is_drawn() -> None:
    cfg = AugmentationSettings(kinds=KINDS)
    assert drawable_kinds(cfg, AugmentationSources()) == ["clean", "reverb", "noise", "speed"]
    rng = np.random.default_rng(3)
    kinds = {augment(SPEECH, AugmentationSources(), cfg, rng)[1] for _ in range(60)}
    assert kinds == {"clean", "reverb", "noise", "speed"}
    with pytest.raises(ValueError, match="no recordings"):
        drawable_kinds(AugmentationSettings(kinds=("music",)), AugmentationSources())


def test_equal_seed_equal_result() -> None:
    cfg = AugmentationSettings(kinds=KINDS)
    runs = [
        [augment(SPEECH, ALL, cfg, rng) for _ in range(12)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    ]
    for (a, kind_a), (b, kind_b) in zip(*runs, strict=True):
        assert kind_a == kind_b
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kinds": ()},
        {"kinds": ("echo",)},
        {"noise_snr": (5.0, 1.0)},
        {"t60": (0.0, 1.0)},
        {"speed": (0.1, 1.0)},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        AugmentationSettings(**wrong)

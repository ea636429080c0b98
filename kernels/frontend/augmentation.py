"""One random augmentation per item: clean, reverberated, noisy, under babble or music, or re-timed.

Source: spec section 6; the x-vector recipe (Snyder et al. 2018), one kind per copy, uniformly.

Recordings come from the caller. Where there are none, noise is white or pink and rooms are made up
by `synthetic_rir`; babble needs other utterances and music needs music, and without them those
kinds are not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from goldcrest.kernels.frontend.noise import (
    BABBLE_TALKERS,
    SNR_RANGES,
    add_noise,
    babble,
    fit_length,
    pink_noise,
    white_noise,
)
from goldcrest.kernels.frontend.reverb import reverberate, synthetic_rir
from goldcrest.kernels.frontend.speed import change_speed

__all__ = ["KINDS", "AugmentationSettings", "AugmentationSources", "augment", "drawable_kinds"]

KINDS = ("clean", "reverb", "noise", "babble", "music", "babble+music", "speed")


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """Which kinds are drawn, and how strong they are."""

    kinds: tuple[str, ...] = ("clean", "reverb", "noise", "babble", "music", "babble+music")
    """Drawn uniformly; a kind named twice is drawn twice as often."""
    noise_snr: tuple[float, float] = SNR_RANGES["noise"]
    """dB, uniform."""
    babble_snr: tuple[float, float] = SNR_RANGES["babble"]
    """dB, uniform."""
    music_snr: tuple[float, float] = SNR_RANGES["music"]
    """dB, uniform."""
    t60: tuple[float, float] = (0.2, 0.8)
    """Seconds, reverberation time of made-up rooms, uniform."""
    speed: tuple[float, float] = (0.95, 1.05)
    """Factor of kind "speed", uniform; more than a few percent makes another speaker."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ValueError(f"kinds must be some of {KINDS}, not {self.kinds}")
        for name in ("noise_snr", "babble_snr", "music_snr", "t60", "speed"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest), not {(low, high)}")
        if self.t60[0] <= 0 or self.speed[0] < 0.5 or self.speed[1] > 2.0:
            raise ValueError("t60 must be positive, and speed lie between 0.5 and 2")


@dataclass(frozen=True, kw_only=True)
class AugmentationSources:
    """Recordings at the rate of the speech, each a vector (n,) float in [-1, 1]."""

    noises: Sequence[Tensor] = field(default=())
    """Environmental noise; empty: white or pink noise."""
    voices: Sequence[Tensor] = field(default=())
    """Other utterances, for babble."""
    music: Sequence[Tensor] = field(default=())
    """Music."""
    rirs: Sequence[Tensor] = field(default=())
    """Room impulse responses; empty: made-up rooms."""


def drawable_kinds(settings: AugmentationSettings, sources: AugmentationSources) -> list[str]:
    """The kinds of `settings` that have what they need.

    Raises:
        ValueError: none of them has.
    """
    missing = set()
    if not sources.voices:
        missing |= {"babble", "babble+music"}
    if not sources.music:
        missing |= {"music", "babble+music"}
    kinds = [kind for kind in settings.kinds if kind not in missing]
    if not kinds:
        raise ValueError(f"there are no recordings for any of the kinds {settings.kinds}")
    return kinds


def augment(
    waveform: Tensor,
    sources: AugmentationSources,
    settings: AugmentationSettings,
    rng: np.random.Generator,
) -> tuple[Tensor, str]:
    """One random augmentation of one waveform.

    Args:
        waveform: (N,) float in [-1, 1].
        sources: recordings to draw from.
        settings: see `AugmentationSettings`.
        rng: the only source of randomness: equal state, equal result.

    Returns:
        The augmented waveform, (N,) float32 (another length only for "speed"), and its kind.
        Peaks may pass 1: the caller's format decides whether that matters.
    """
    kinds = drawable_kinds(settings, sources)
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "reverb":
        return reverberate(waveform, _room(sources, settings, rng)), kind
    if kind == "speed":
        return change_speed(waveform, float(rng.uniform(*settings.speed))), kind
    out, samples = waveform.float(), waveform.shape[0]
    if kind == "noise":
        out = add_noise(out, _noise(samples, sources, rng), float(rng.uniform(*settings.noise_snr)))
    if "music" in kind:
        music = fit_length(_choose(sources.music, rng), samples, rng).float()
        out = add_noise(out, music, float(rng.uniform(*settings.music_snr)))
    if "babble" in kind:
        talkers = int(rng.integers(BABBLE_TALKERS[0], BABBLE_TALKERS[1] + 1))
        voices = [_choose(sources.voices, rng) for _ in range(talkers)]
        murmur = babble(voices, samples, rng)
        out = add_noise(out, murmur, float(rng.uniform(*settings.babble_snr)))
    return out, kind


def _choose(recordings: Sequence[Tensor], rng: np.random.Generator) -> Tensor:
    return recordings[int(rng.integers(len(recordings)))]


def _noise(samples: int, sources: AugmentationSources, rng: np.random.Generator) -> Tensor:
    if sources.noises:
        return fit_length(_choose(sources.noises, rng), samples, rng).float()
    return white_noise(samples, rng) if rng.random() < 0.5 else pink_noise(samples, rng)


def _room(
    sources: AugmentationSources, settings: AugmentationSettings, rng: np.random.Generator
) -> Tensor:
    if sources.rirs:
        return _choose(sources.rirs, rng)
    return synthetic_rir(float(rng.uniform(*settings.t60)), rng)

"""Augmented copies of waveforms: which corruption, how strong, from what noise.

A copy is a speed change, reverberation, babble or noise, drawn uniformly from what is switched on
(spec of the speaker study, "augmentations").
Without noise and room recordings the noise is white or pink, the rooms are synthetic and the babble
is other utterances of the corpus, so that augmentation needs no data beyond the corpus itself.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import Config, InputFiles, StepError
from goldcrest.tasks.data import audio
from goldcrest.tasks.data.corpus import manifest_folders, read_corpora

if TYPE_CHECKING:
    import torch

_LIMITS = audio.AudioLimits(min_seconds=0.005)  # an impulse response is short
Kind = Literal["noise", "reverb", "babble", "speed"]


class AugmentConfig(Config):
    """Augmented copies of every training utterance, made once, before feature extraction."""

    copies: int = Field(0, ge=0, description="augmented copies per training utterance; 0: none")
    kinds: tuple[Kind, ...] = Field(
        ("noise", "reverb", "babble", "speed"), min_length=1, description="corruptions to draw from"
    )
    noise_paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (),
        description="corpora of noises and room impulse responses (metadata `kind`: noise or rir, "
        "or folders of that name); none: synthetic noise and rooms",
    )
    noise_beside: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="folders of noise corpora that are given as manifest files (filled in)"
    )
    noise_snr: tuple[float, float] = Field((0.0, 15.0), description="range of noise SNR (dB)")
    babble_snr: tuple[float, float] = Field((13.0, 20.0), description="range of babble SNR (dB)")
    babble_voices: tuple[int, int] = Field((3, 8), description="range of talkers in babble")
    t60: tuple[float, float] = Field((0.2, 0.8), description="range of synthetic room T60 (s)")
    speed: tuple[float, float] = Field(
        (0.95, 1.05), description="range of speed factors; more changes the perceived speaker"
    )

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Noises beside a manifest belong to the result, so they must be in the key."""
        object.__setattr__(self, "noise_beside", manifest_folders(self.noise_paths))
        return self

    @field_validator("noise_snr", "babble_snr", "babble_voices", "t60", "speed")
    @classmethod
    def _rising(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if not limits[0] <= limits[1]:
            raise ValueError(f"a range is [least, most], not {list(limits)}")
        return limits

    @field_validator("babble_voices", "t60", "speed")
    @classmethod
    def _above_zero(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if limits[0] <= 0:
            raise ValueError(f"must be above 0, not {list(limits)}")
        return limits


@dataclass(frozen=True)
class NoiseBank:
    """What to corrupt with; empty lists: synthetic noise and rooms.

    `noises` and `rooms` are files, or what is in them, opened when they are drawn: a corpus of
    noises is larger than memory. `voices` are pairs of a recording and a waveform (N,) float32 at
    16 kHz. `left_out` counts files that can't be read.
    """

    noises: Sequence[Path | bytes]
    rooms: Sequence[Path | bytes]
    voices: Sequence[tuple[str, np.ndarray]]
    left_out: int = 0

    def without(self, recording: str) -> NoiseBank:
        """The bank without the voice of this recording, which would be babbling to itself."""
        others = [voice for voice in self.voices if voice[0] != recording]
        return replace(self, voices=others)


def load_noise_bank(cfg: AugmentConfig, voices: Sequence[tuple[str, np.ndarray]]) -> NoiseBank:
    """List the noise corpora; a file whose header can't be read is left out and counted."""
    noises: list[Path | bytes] = []
    rooms: list[Path | bytes] = []
    left_out = 0
    for recording in read_corpora(cfg.noise_paths) if cfg.noise_paths else []:
        if recording.problem is not None:
            left_out += 1
            continue
        is_room = recording.kind == "rir" or "rir" in recording.path.parts
        source = recording.source()
        try:
            audio.read_header(source, _LIMITS)
        except audio.AudioError:
            left_out += 1
            continue
        (rooms if is_room else noises).append(source)
    return NoiseBank(noises, rooms, voices, left_out)


@functools.lru_cache(maxsize=64)
def _samples(source: Path | bytes) -> np.ndarray:
    """(N,) float32; the last ones drawn by this process are kept."""
    try:
        return audio.decode(source, _LIMITS)
    except audio.AudioError as error:
        name = source if isinstance(source, Path) else "a recording of a dataset"
        raise StepError(
            f"noise {name}: {error}", hint="mend the noise corpus, or remove it"
        ) from error


def corrupt(
    samples: np.ndarray, utterance: str, copy: int, cfg: AugmentConfig, bank: NoiseBank, seed: int
) -> np.ndarray:
    """Copy number `copy` of an utterance, (N,) -> (about N,) float32.

    The draw depends on seed, utterance id and copy alone, never on the order of the work.
    """
    import torch

    from goldcrest.kernels.frontend import noise as mixing
    from goldcrest.kernels.frontend.reverb import reverberate
    from goldcrest.kernels.frontend.speed import change_speed

    rng = np.random.default_rng([seed, 4, copy, zlib.crc32(utterance.encode())])
    speech = torch.from_numpy(samples)
    kind = cfg.kinds[int(rng.integers(len(cfg.kinds)))]
    if kind == "speed":
        speech = change_speed(speech, float(rng.uniform(*cfg.speed)))
    elif kind == "reverb":
        speech = reverberate(speech, _room(cfg, bank, rng))
    elif kind == "babble" and bank.voices:
        count = int(rng.integers(cfg.babble_voices[0], cfg.babble_voices[1] + 1))
        chosen = rng.choice(len(bank.voices), size=min(count, len(bank.voices)), replace=False)
        voices = [torch.from_numpy(bank.voices[int(i)][1]) for i in chosen]
        crowd = mixing.babble(voices, len(speech), rng)
        speech = mixing.add_noise(speech, crowd, float(rng.uniform(*cfg.babble_snr)))
    else:
        speech = mixing.add_noise(
            speech, _noise(len(speech), bank, rng), float(rng.uniform(*cfg.noise_snr))
        )
    out = speech.float().numpy()
    return out / max(1.0, float(np.abs(out).max(initial=0.0)))


def _room(cfg: AugmentConfig, bank: NoiseBank, rng: np.random.Generator) -> torch.Tensor:
    import torch

    from goldcrest.kernels.frontend.reverb import synthetic_rir

    if bank.rooms:
        return torch.from_numpy(_samples(bank.rooms[int(rng.integers(len(bank.rooms)))]))
    return synthetic_rir(float(rng.uniform(*cfg.t60)), rng)


def _noise(samples: int, bank: NoiseBank, rng: np.random.Generator) -> torch.Tensor:
    import torch

    from goldcrest.kernels.frontend import noise as mixing

    if bank.noises:
        chosen = torch.from_numpy(_samples(bank.noises[int(rng.integers(len(bank.noises)))]))
        return mixing.fit_length(chosen, samples, rng)
    make = mixing.white_noise if rng.random() < 0.5 else mixing.pink_noise
    return make(samples, rng)

"""The embedded corpus: speech from espeak-ng with many distinct voices, made on the spot.

The PyPI package `espeakng-loader` carries the library and its voice variants, so nothing is
downloaded. A synthetic speaker is a voice variant (source and formants), an accent, a base pitch, a
pitch range and a rate; an utterance varies sentence, pitch, rate, level and noise around it. The
same seed gives the same samples.
"""

from __future__ import annotations

import _ctypes
import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.audio import condition

# Variants that sound like plain talkers. Left out: whispers, robots, and every variant with breath
# noise, which the library draws from memory that differs from run to run.
MALE_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Alex", "Andy", "Denis", "Diogo", "Gene"),
    *("Hugo", "Lee", "Marco", "Michael", "adam", "antonio", "benjamin", "boris", "david", "ed"),
    *("edward", "gustave", "ian", "iven", "john", "max", "michel", "miguel", "norbert", "pablo"),
    *("paul", "pedro", "quincy", "rob", "travis", "zac", "grandpa"),
)
FEMALE_VARIANTS = (
    *("f1", "f4", "Andrea", "Annie", "anika", "aunty", "belinda", "linda", "shelby", "steph"),
    *("steph2", "grandma"),
)
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbcwmd", "en-us-nyc")

_SUBJECTS = (
    *("the old captain", "my younger sister", "a quiet farmer", "the second engineer"),
    *("our new neighbour", "the tall musician", "every careful driver", "the night nurse"),
    *("a patient teacher", "the village baker", "her best friend", "the museum guide"),
)
_VERBS = (
    *("carried", "found", "repaired", "painted", "described", "forgot", "borrowed", "watched"),
    *("opened", "measured", "followed", "photographed", "collected", "wrapped", "answered"),
)
_OBJECTS = (
    *("the wooden boat", "five green bottles", "a broken clock", "the morning paper"),
    *("two heavy suitcases", "an unusual letter", "the yellow bicycle", "a basket of plums"),
    *("the longest bridge", "a silver spoon", "the winter coats", "three small birds"),
)
_PLACES = (
    *("near the harbour", "behind the station", "before the storm", "on a cold evening"),
    *("without saying a word", "at the end of June", "along the river", "after the concert"),
    *("in the empty kitchen", "under the bright stars", "for the third time", "with great joy"),
)

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_CHARS_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker: espeak-ng's own units (pitch and range 0-99, rate in words/minute)."""

    name: str
    sex: str
    variant: str
    accent: str
    pitch: int
    pitch_range: int
    rate: int


@dataclass(frozen=True)
class Spoken:
    """One synthetic utterance: (N,) float32 at 16 kHz."""

    id: str
    voice: Voice
    text: str
    samples: np.ndarray


def make_voices(count: int, seed: int) -> list[Voice]:
    """`count` distinct speakers; variants repeat, with other accent and pitch, after 52 voices."""
    rng = np.random.default_rng([seed, 1])
    pool = [("M", v) for v in MALE_VARIANTS] + [("F", v) for v in FEMALE_VARIANTS]
    order = [int(i) for i in rng.permutation(len(pool))]
    voices = []
    for number in range(count):
        sex, variant = pool[order[number % len(pool)]]
        voices.append(
            Voice(
                name=f"voice{number:03d}",
                sex=sex,
                variant=variant,
                accent=str(rng.choice(ACCENTS)),
                pitch=int(rng.integers(25, 65) if sex == "M" else rng.integers(45, 80)),
                pitch_range=int(rng.integers(30, 70)),
                rate=int(rng.integers(140, 200)),
            )
        )
    return voices


def sentence(rng: np.random.Generator) -> str:
    """A varied English sentence of about 3 s from a small grammar (about 26,000 sentences)."""
    parts = (rng.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES))
    return " ".join(str(part) for part in parts)


def synthesize(voice: Voice, utterances: int, seed: int) -> Iterator[Spoken]:
    """The utterances of one speaker, each with its own sentence, prosody, level and noise.

    The random stream depends on the voice's name and the seed alone, so voices can be spread over
    processes. InputError if espeak-ng is not installed.
    """
    rng = np.random.default_rng([seed, 2, *voice.name.encode()])
    with _Espeak() as engine:
        for number in range(utterances):
            text = sentence(rng)
            spoken_by = replace(
                voice,
                pitch=int(np.clip(voice.pitch + rng.integers(-6, 7), 0, 99)),
                rate=int(voice.rate * rng.uniform(0.9, 1.1)),
            )
            clean = condition(engine.speak(text, spoken_by), engine.rate)
            samples = _record(clean, rng)
            yield Spoken(f"{voice.name}/{number:03d}.wav", voice, text, samples)


def _record(clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clean speech as recorded: a level of -30 to -14 dBFS, coloured noise at 15-35 dB SNR."""
    level = 10.0 ** (rng.uniform(-30.0, -14.0) / 20.0)
    speech = clean * (level / max(float(np.sqrt(np.mean(clean**2))), 1e-6))
    spectrum = np.fft.rfft(rng.standard_normal(len(speech)))
    colour = np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0.0, 0.5)
    noise = np.fft.irfft(spectrum * colour, n=len(speech))
    snr = 10.0 ** (rng.uniform(15.0, 35.0) / 20.0)
    noise *= level / snr / max(float(np.sqrt(np.mean(noise**2))), 1e-12)
    mixed = speech + noise
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


class _Espeak:
    """espeak-ng through its C interface, loaded afresh for every speaker.

    The library keeps static state that even its own Terminate leaves behind (its pseudo-random
    jitter, for one), so that a voice would sound a little different after other voices. A copy of
    the library, loaded and unloaded, is what makes a voice a function of its settings alone; the
    file itself will not do, since anybody else in this process may hold it open.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise InputError(
                "the embedded corpus needs espeak-ng",
                hint="pip install 'goldcrest[demo]', or give real speech with --corpus DIR",
            ) from error
        with tempfile.TemporaryDirectory(prefix="goldcrest-espeak-") as folder:
            private = shutil.copy(espeakng_loader.get_library_path(), folder)
            self._library = ctypes.CDLL(private)
        data = str(Path(espeakng_loader.get_data_path())).encode()
        self.rate: int = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if self.rate <= 0:
            raise InputError(f"espeak-ng could not start with the data in {data.decode()}")
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept: C holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)

    def _collect(self, wave: ctypes._Pointer, count: int, _events: int | None) -> int:
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """(N,) float32 at `self.rate` Hz."""
        name = f"{voice.accent}+{voice.variant}".encode()
        if self._library.espeak_SetVoiceByName(name) != 0:
            raise InputError(f"espeak-ng has no voice '{name.decode()}'")
        for parameter, value in (
            (_RATE, voice.rate),
            (_VOLUME, 90),
            (_PITCH, voice.pitch),
            (_RANGE, voice.pitch_range),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks = []
        encoded = text.encode()
        self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _CHARS_UTF8, None, None
        )
        self._library.espeak_Synchronize()
        return np.concatenate(self._chunks).astype(np.float32) / 32768.0

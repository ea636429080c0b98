"""Noise at a chosen SNR, reverberation, speed, crops and SpecAugment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.frontend.crop import random_crop, spaced_crops, wrap
from goldcrest.kernels.frontend.noise import (
    add_noise,
    babble,
    fit_length,
    pink_noise,
    power_db,
    white_noise,
)
from goldcrest.kernels.frontend.reverb import reverberate, reverberate_reference, synthetic_rir
from goldcrest.kernels.frontend.specaugment import SpecAugmentSettings, spec_augment
from goldcrest.kernels.frontend.speed import change_speed


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@settings(max_examples=25, deadline=None)
@given(st.floats(-10, 30), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_snr_equals_the_request_within_a_tenth_of_a_db(snr: float, a: float, b: float) -> None:
    speech, noise = a * white_noise(8_000, rng()), b * pink_noise(8_000, rng())
    added = add_noise(speech, noise, snr) - speech
    assert power_db(speech) - power_db(added) == pytest.approx(snr, abs=0.1)


def test_noise_on_silence_changes_nothing() -> None:
    speech = white_noise(100, rng())
    assert torch.equal(add_noise(speech, torch.zeros(100), 10.0), speech)
    assert not add_noise(torch.zeros(100), speech, 10.0).any()


@pytest.mark.parametrize("size", [5, 50, 500])
def test_noise_is_cut_or_repeated_to_length(size: int) -> None:
    noise = torch.arange(size, dtype=torch.float32)
    found = fit_length(noise, 123, rng())
    steps = (found[1:] - found[:-1]) % size
    assert found.shape == (123,)
    assert torch.all(steps == 1)  # consecutive, wrapping around


def test_pink_noise_falls_three_db_per_octave() -> None:
    power = np.abs(np.fft.rfft(pink_noise(1 << 16, rng()).numpy())) ** 2
    low, high = power[1_000:2_000].mean(), power[8_000:16_000].mean()
    assert 10 * np.log10(low / high) == pytest.approx(9.03, abs=0.5)  # three octaves


def test_babble_is_a_sum_of_voices() -> None:
    voices = [white_noise(300, np.random.default_rng(i)) for i in range(4)]
    found = babble(voices, 1_000, rng())
    assert found.shape == (1_000,)
    assert float(found.square().mean()) == pytest.approx(0.25, rel=0.4)  # 4 x (1/4)^2
    with pytest.raises(ValueError, match="voice"):
        babble([], 10, rng())


@pytest.mark.parametrize("delay", [0, 40])
def test_a_delta_response_is_the_identity(delay: int) -> None:
    speech = white_noise(1_000, rng())
    rir = torch.zeros(100)
    rir[delay] = 0.3
    torch.testing.assert_close(reverberate(speech, rir), speech, atol=1e-5, rtol=1e-5)
    if delay:  # unaligned: the delay stays
        late = reverberate(speech, rir, align=False)
        torch.testing.assert_close(late[delay:], speech[:-delay], atol=1e-5, rtol=1e-5)
        assert float(late[:delay].abs().max()) < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.booleans())
def test_reverberation_equals_the_plain_twin(samples: int, taps: int, align: bool) -> None:
    speech = white_noise(samples, rng())
    rir = white_noise(taps, np.random.default_rng(taps))
    expected = reverberate_reference(speech, rir, align=align)
    torch.testing.assert_close(
        reverberate(speech, rir, align=align), expected, atol=1e-5, rtol=1e-5
    )


def test_synthetic_room_decays_by_sixty_db_in_t60() -> None:
    rir = synthetic_rir(0.4, rng(), direct=0.0).double().square()
    remaining = rir.flip(0).cumsum(0).flip(0)  # Schroeder's backward integral
    at = {t: float(10 * torch.log10(remaining[int(t * 16_000)])) for t in (0.05, 0.15)}
    assert (at[0.05] - at[0.15]) / 0.1 * 0.4 == pytest.approx(60, abs=6)
    assert float(rir.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("speed", [0.95, 1.0, 1.05])
def test_speed_changes_length_and_pitch_together(speed: float) -> None:
    tone = torch.sin(2 * np.pi * 400 * torch.arange(16_000) / 16_000)
    found = change_speed(tone, speed)
    assert abs(found.shape[0] - 16_000 / speed) <= 1
    spectrum = torch.fft.rfft(found * torch.hann_window(found.shape[0])).abs()
    peak = float(spectrum.argmax()) * 16_000 / found.shape[0]
    assert peak == pytest.approx(400 * speed, abs=1.5)


def test_crops_wrap_short_signals_and_space_evenly() -> None:
    assert wrap(torch.arange(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    found = random_crop(torch.arange(100), 10, rng())
    assert (found[1:] - found[:-1]).tolist() == [1] * 9
    crops = spaced_crops(torch.arange(100), 20, 5)
    assert crops[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert spaced_crops(torch.arange(4), 6, 2).tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_spec_augment_masks_within_its_limits_and_only_speech() -> None:
    x = torch.ones(64, 50, 24)
    lengths = torch.full((64,), 30)
    cfg = SpecAugmentSettings(time_masks=1, time_width=10, frequency_masks=1, frequency_width=8)
    found = spec_augment(x, lengths, cfg, rng())
    assert bool(x.all())  # the input is untouched
    frames = (found == 0).all(2).sum(1)
    bins = (found[:, :30] == 0).all(1).sum(1)
    assert int(frames.max()) <= 10 and int(bins.max()) <= 8
    assert int(frames.max()) > 5 and int(bins.max()) > 4  # 64 draws reach the upper half
    time_only = SpecAugmentSettings(frequency_masks=0)
    assert bool(spec_augment(x, lengths, time_only, rng())[:, 30:].all())
    share = SpecAugmentSettings(time_width=50, largest_share=0.1, frequency_masks=0)
    assert int((spec_augment(x, None, share, rng()) == 0).all(2).sum(1).max()) <= 5


def test_augmentation_is_seeded() -> None:
    x = torch.randn(4, 30, 8)
    cfg = SpecAugmentSettings()
    assert torch.equal(spec_augment(x, None, cfg, rng()), spec_augment(x, None, cfg, rng()))
    assert torch.equal(synthetic_rir(0.2, rng()), synthetic_rir(0.2, rng()))


@pytest.mark.parametrize(
    "call",
    [
        lambda: add_noise(torch.ones(3), torch.ones(4), 0.0),
        lambda: add_noise(torch.ones(3), torch.ones(3), float("nan")),
        lambda: fit_length(torch.zeros(0), 3, rng()),
        lambda: reverberate(torch.ones(2, 2), torch.ones(2)),
        lambda: reverberate(torch.ones(2), torch.zeros(2)),
        lambda: synthetic_rir(0.0, rng()),
        lambda: change_speed(torch.ones(2, 2), 1.0),
        lambda: change_speed(torch.ones(2), 3.0),
        lambda: wrap(torch.zeros(0), 3),
        lambda: wrap(torch.zeros(3), 0),
        lambda: spaced_crops(torch.zeros(3), 1, 0),
        lambda: spec_augment(torch.ones(2, 2), None, SpecAugmentSettings(), rng()),
        lambda: SpecAugmentSettings(time_masks=-1),
        lambda: SpecAugmentSettings(largest_share=2.0),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must|empty|needed|cannot"):
        call()

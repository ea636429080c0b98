"""Deltas, sliding mean and VAD against naive loops, borders and short utterances included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.frontend.cmvn import global_cmvn, sliding_cmn, sliding_cmn_reference
from goldcrest.kernels.frontend.deltas import add_deltas, add_deltas_reference, delta_weights
from goldcrest.kernels.frontend.vad import VadSettings, energy_vad, energy_vad_reference


def features(frames: int, bins: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(frames, bins, generator=generator, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(1, 4))
def test_deltas_equal_the_plain_twin(frames: int, order: int, window: int) -> None:
    x = features(frames)
    expected = add_deltas_reference(x, order=order, window=window)
    torch.testing.assert_close(add_deltas(x, order=order, window=window), expected)


def test_deltas_of_a_line_are_its_slope() -> None:
    line = torch.arange(40, dtype=torch.float64)[:, None] * 2.5
    out = add_deltas(line)
    torch.testing.assert_close(out[6:-6, 1], torch.full((28,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(out[6:-6, 2], torch.zeros(28, dtype=torch.float64))


def test_delta_weights_of_window_two_are_the_textbook_ones() -> None:
    # HTK book, eq. 5.16 with Theta = 2: (-2, -1, 0, 1, 2) / 10.
    assert delta_weights(1, 2)[1].tolist() == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(1, 70))
def test_sliding_cmn_equals_the_plain_twin(frames: int, window: int) -> None:
    x = features(frames)
    torch.testing.assert_close(sliding_cmn(x, window), sliding_cmn_reference(x, window))


def test_sliding_cmn_window_of_the_recipe() -> None:
    x = features(700)
    out = sliding_cmn(x, 300)
    torch.testing.assert_close(out[400], x[400] - x[250:550].mean(0))  # [t - 150, t + 150)
    torch.testing.assert_close(out[0], x[0] - x[:300].mean(0))  # shifted, not shrunk
    torch.testing.assert_close(out[-1], x[-1] - x[-300:].mean(0))


def test_sliding_cmn_of_a_short_utterance_is_the_global_mean() -> None:
    x = features(120)
    torch.testing.assert_close(sliding_cmn(x, 300), global_cmvn(x))


def test_sliding_cmn_keeps_precision_on_long_float32_input() -> None:
    # 10 minutes around an offset of 1000: float32 running sums would be off by whole units.
    x = 1000 + features(60_000, 1).float()
    out = sliding_cmn(x, 300)
    expected = x[30_000] - x[29_850:30_150].double().mean(0)
    torch.testing.assert_close(out[30_000], expected.float(), atol=1e-3, rtol=0)


def test_global_cmvn_gives_zero_mean_and_unit_variance() -> None:
    out = global_cmvn(5 + 3 * features(500), variance=True)
    torch.testing.assert_close(out.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(out.square().mean(0), torch.ones(3, dtype=torch.float64))
    assert torch.isfinite(global_cmvn(torch.ones(10, 2), variance=True)).all()


def test_strength_subtracts_a_share_of_the_mean() -> None:
    x = 5 + features(500)
    half = global_cmvn(x, strength=0.5)
    torch.testing.assert_close(half, 0.5 * (x + global_cmvn(x)))
    assert torch.equal(global_cmvn(x, strength=0.0), x)
    sliding = sliding_cmn(x, 100, strength=0.25)
    torch.testing.assert_close(sliding, 0.75 * x + 0.25 * sliding_cmn(x, 100))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 25), max_size=50),
    st.integers(0, 8),
    st.floats(0.1, 1.0),
)
def test_vad_equals_the_plain_twin(energies: list[float], context: int, share: float) -> None:
    log_energy = torch.tensor(energies, dtype=torch.float64)
    cfg = VadSettings(context=context, proportion=share)
    assert torch.equal(energy_vad(log_energy, cfg), energy_vad_reference(log_energy, cfg))


def test_vad_threshold_of_the_recipe() -> None:
    # Mean 11, threshold 5.5 + 0.5 * 11 = 11: only the loud frame is above it.
    found = energy_vad(torch.tensor([9.0, 10.0, 14.0]), VadSettings())
    assert found.tolist() == [False, False, True]


def test_vad_of_silence_finds_nothing() -> None:
    silence = torch.full((50,), -15.9)  # ln of float32 epsilon
    assert not energy_vad(silence, VadSettings()).any()
    assert energy_vad(torch.zeros(0), VadSettings()).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: add_deltas(torch.zeros(3)),
        lambda: add_deltas(torch.zeros(3, 2), order=-1),
        lambda: sliding_cmn(torch.zeros(3)),
        lambda: sliding_cmn(torch.zeros(3, 2), 0),
        lambda: global_cmvn(torch.zeros(3, 2), strength=1.5),
        lambda: energy_vad(torch.zeros(3, 2), VadSettings()),
        lambda: VadSettings(context=-1),
        lambda: VadSettings(proportion=0.0),
        lambda: VadSettings(mean_scale=-1.0),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match="must"):
        call()

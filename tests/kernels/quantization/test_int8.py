"""Grids, GPTQ, observers, smoothing, skip criteria."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from goldcrest.kernels.quantization import gptq, int8, kurtosis, smoothing
from goldcrest.kernels.quantization.calibration import (
    ChannelMax,
    ChannelPercentile,
    MinMax,
    Moments,
    Percentile,
)


@settings(max_examples=40, deadline=None)
@given(low=st.floats(-1e4, 1e4), width=st.floats(0, 1e4), bits=st.integers(2, 8))
def test_activation_grid_covers_its_range(low: float, width: float, bits: int) -> None:
    """|x - x^| <= s / 2 inside the range (up to the rounding of z), and 0 is exact."""
    grid = int8.grid_of_range(low, low + width, bits)
    x = torch.linspace(min(low, 0.0), max(low + width, 0.0), 97)
    error = (int8.fake_quantize(x, grid) - x).abs().max()
    assert float(error) <= grid.scale * (1.0 + 1e-3)
    assert float(int8.fake_quantize(torch.zeros(1), grid)) == 0.0
    inside = (int8.quantize(x, grid) > 0) & (int8.quantize(x, grid) < grid.top)
    error = (int8.fake_quantize(x, grid) - x).abs()[inside]
    assert error.numel() == 0 or float(error.max()) <= grid.scale * (0.5 + 1e-3)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 33), seed=st.integers(0, 99))
def test_weight_codes_are_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0  # a dead channel
    scales = int8.weight_scales(weight)
    codes = int8.quantize_weight(weight, scales)
    assert codes.dtype == torch.int8
    error = (int8.dequantize_weight(codes, scales) - weight).abs()
    assert (error <= scales[:, None] * (0.5 + 1e-4)).all()
    assert (codes[weight == 0] == 0).all()


@pytest.mark.parametrize("shape", [(5, 40, 7), (64, 512, 96), (1, 33, 1)])
def test_integer_product_is_exact_even_at_the_extremes(shape: tuple[int, int, int]) -> None:
    """Expected: int64 sums. All codes at their largest would saturate with 8-bit activations."""
    tokens, inputs, outputs = shape
    grid = int8.Grid(scale=0.02, zero_point=31)
    scales = torch.rand(outputs) + 0.1
    for codes, weight in (
        (torch.randint(0, 128, (tokens, inputs)), torch.randint(-127, 128, (outputs, inputs))),
        (torch.full((tokens, inputs), 127), torch.full((outputs, inputs), 127)),
    ):
        codes, weight = codes.to(torch.uint8), weight.to(torch.int8)
        got = int8.linear(codes, grid, weight, scales)
        torch.testing.assert_close(
            got, int8.linear_reference(codes, grid, weight, scales), rtol=1e-6, atol=0
        )


def test_integer_product_equals_fake_quantization() -> None:
    """INT8 matmul = float matmul of the fake-quantized operands (property 10)."""
    x, weight = torch.randn(9, 48), torch.randn(12, 48)
    grid = int8.grid_of_range(float(x.min()), float(x.max()))
    scales = int8.weight_scales(weight)
    codes = int8.quantize_weight(weight, scales)
    expected = int8.fake_quantize(x, grid) @ int8.dequantize_weight(codes, scales).t()
    got = int8.linear(int8.quantize(x, grid), grid, codes, scales)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_int8_keys_and_values_give_nearly_the_same_attention() -> None:
    """A cache quantized per token (dynamic grids): within 2 % of the float output (property 10)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 20, 32)

    def restored(x: Tensor) -> Tensor:
        codes, scales, zeros = int8.quantize_rows(x, bits=8)
        return scales * (codes.float() - zeros)

    expected = torch.softmax(query @ key.t() / math.sqrt(32), dim=-1) @ value
    weights = torch.softmax(query @ restored(key).t() / math.sqrt(32), dim=-1)
    got = weights @ restored(value)
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_dynamic_grids_are_each_rows_own() -> None:
    """Expected: the static grid of each row alone."""
    x = torch.randn(6, 50) * torch.tensor([1e-3, 1, 10, 100, 1, 1.0])[:, None]
    codes, scales, zeros = int8.quantize_rows(x)
    for row, code, scale, zero in zip(x, codes, scales, zeros, strict=True):
        grid = int8.grid_of_range(float(row.min()), float(row.max()))
        torch.testing.assert_close(
            scale * (code.float() - zero), int8.fake_quantize(row[None], grid)[0]
        )


def correlated(seed: int, columns: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    x = (x + torch.randn(columns, 96, generator=generator)).double()
    return torch.randn(16, columns, generator=generator).double(), 2 * x @ x.t()


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_in_the_h_metric(act_order: bool) -> None:
    """Property 11, on a 4-bit grid (levels 7), asserted on the mean over seeds."""
    ours = theirs = 0.0
    for seed in range(20):
        weight, hessian = correlated(seed)
        scales = weight.abs().amax(dim=1) / 7
        rounded = (weight / scales[:, None]).round() * scales[:, None]
        setting = gptq.Settings(act_order=act_order)
        codes = gptq.quantize(weight, hessian, scales, setting, levels=7)
        ours += gptq.loss(weight, codes.double() * scales[:, None], hessian)
        theirs += gptq.loss(weight, rounded, hessian)
    assert ours < 0.8 * theirs


def test_gptq_with_uncorrelated_inputs_is_rounding() -> None:
    weight, _ = correlated(0)
    scales = int8.weight_scales(weight)
    diagonal = torch.diag(torch.rand(32).double() + 0.5)
    codes = gptq.quantize(weight, diagonal, scales, gptq.Settings(act_order=True))
    assert torch.equal(codes, int8.quantize_weight(weight, scales))


def test_gptq_does_not_depend_on_the_block() -> None:
    weight, hessian = correlated(1)
    scales = int8.weight_scales(weight)
    first, *others = [
        gptq.quantize(weight, hessian, scales, gptq.Settings(block=block)) for block in (1, 7, 128)
    ]
    assert all(torch.equal(first, other) for other in others)


def test_pruned_weights_stay_zero_through_gptq() -> None:
    """Masked zeros remain exact zeros (property 10) although corrections reach their columns."""
    weight, hessian = correlated(2)
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) > 0.7
    sparse = weight * mask
    codes = gptq.quantize(sparse, hessian, int8.weight_scales(sparse), gptq.Settings(), mask=mask)
    assert (codes[~mask] == 0).all()
    unmasked = gptq.quantize(sparse, hessian, int8.weight_scales(sparse), gptq.Settings())
    assert (unmasked[~mask] != 0).any()


def test_gptq_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        gptq.quantize(torch.ones(2, 3), torch.eye(2), torch.ones(2), gptq.Settings())


def test_moments_by_halves_equal_moments_at_once() -> None:
    """Expected: float64 formulas on all values together; 3 for a normal distribution."""
    x = torch.randn(30000, generator=torch.Generator().manual_seed(0)).double() * 2 + 5
    streamed, other = Moments(), Moments()
    for part in x[:10000].chunk(7):
        streamed.observe(part)
    other.observe(x[10000:])
    streamed.merge(other)
    centred = x - x.mean()
    expected = float(centred.pow(4).mean() / centred.square().mean().square())
    assert streamed.kurtosis() == pytest.approx(expected, rel=1e-9)
    assert streamed.kurtosis() == pytest.approx(3.0, abs=0.1)
    assert streamed.mean == pytest.approx(float(x.mean()), rel=1e-12)
    assert Moments().kurtosis() == 0.0


def test_percentile_range_cuts_the_tails() -> None:
    """Expected: torch.quantile, to the precision of bfloat16."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 1e6, -1e6
    halves = Percentile(0.99), Percentile(0.99)
    halves[0].observe(x[:5000])
    halves[1].observe(x[5000:])
    halves[0].merge(halves[1])
    low, high = halves[0].range()
    assert low == pytest.approx(float(x.quantile(0.005)), rel=0.01)
    assert high == pytest.approx(float(x.quantile(0.995)), rel=0.01)
    everything = Percentile(1.0)
    everything.observe(x)
    assert everything.range() == pytest.approx((-1e6, 1e6), rel=0.01)


def test_percentile_of_each_channel_cuts_its_own_tail() -> None:
    """Expected: torch.quantile of every channel's magnitudes, to a bucket of 1/32 above it."""
    x = torch.randn(5000, 3, 4, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-9, 9, 12).reshape(3, 4)  # the ends lie outside of all buckets
    x[0] *= 1000
    seen, everything, most = ChannelPercentile(0.99), ChannelPercentile(1.0), ChannelMax()
    for part in x.split(700):
        for observer in (seen, everything, most):
            observer.observe(part)
    assert torch.equal(everything.largest(), most.largest())
    share = (x.abs() <= seen.largest()).float().mean(dim=0)
    assert bool((share >= 0.99).all())
    exact = x.abs().quantile(0.99, dim=0)
    within = (exact > 2**-20) & (exact < 2**12)
    assert int(within.sum()) == 6
    assert bool((seen.largest() <= exact * 1.04)[within].all())
    assert bool((seen.largest() <= most.largest()).all())


def test_observers_refuse_nothing_and_nan() -> None:
    empty = ChannelPercentile()
    with pytest.raises(ValueError, match="no activation"):
        empty.largest()
    with pytest.raises(ValueError, match="NaN"):
        empty.observe(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="share must be"):
        ChannelPercentile(0.0)
    for observer in (MinMax(), Percentile()):
        with pytest.raises(ValueError, match="no activation"):
            observer.range()
        with pytest.raises(ValueError, match="NaN"):
            observer.observe(torch.tensor([float("nan")]))


def test_kurtosis_finds_the_planted_outlier_operation() -> None:
    """One entry in 2,000 far out; another operation is larger everywhere (property 9)."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "plain": torch.randn(40, 50, generator=generator),
        "large": 100 * torch.randn(40, 50, generator=generator),
        "outlier": torch.randn(40, 50, generator=generator),
    }
    inputs["outlier"][3, 4] = 60.0
    moments = {name: Moments() for name in inputs}
    ranges = {name: MinMax() for name in inputs}
    for name, x in inputs.items():
        moments[name].observe(x)
        ranges[name].observe(x)
    assert kurtosis.rank("kurtosis", moments, ranges)[0] == "outlier"
    assert kurtosis.rank("max_abs", moments, ranges)[0] == "large"
    assert kurtosis.rank("range", moments, ranges)[0] == "large"
    assert kurtosis.to_skip(["a", "b", "c"], 2) == ("a", "b")
    errors = {"a": 0.1, "b": 0.3, "c": 0.2}
    assert kurtosis.rank_by_measurement(["a", "b", "c"], errors.__getitem__) == ["b", "c", "a"]
    with pytest.raises(ValueError, match="criterion"):
        kurtosis.rank("entropy", moments, ranges)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm_type", [nn.BatchNorm1d, nn.LayerNorm])
def test_smoothing_keeps_the_function_and_flattens_channels(norm_type) -> None:
    """Output within 1e-5, lower max/median over channels (property 9)."""
    torch.manual_seed(0)
    norm = norm_type(12).eval()
    first, second = nn.Linear(12, 8), nn.Linear(12, 5)
    x = torch.randn(200, 12)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[3] *= 40
        norm.bias.normal_()
        before = first(norm(x)), second(norm(x))
        seen = ChannelMax()
        seen.observe(norm(x))
        smoothing.smooth(
            [smoothing.Produced(layer=norm, start=0, stop=12)],
            [
                smoothing.Consumed(layer=first, start=0, stop=12),
                smoothing.Consumed(layer=second, start=0, stop=12),
            ],
            seen.largest(),
            smoothing.Settings(),
        )
        after = ChannelMax()
        after.observe(norm(x))
        for old, layer in zip(before, (first, second), strict=True):
            torch.testing.assert_close(layer(norm(x)), old, rtol=1e-4, atol=1e-4)
    ratios = [seen_.largest().max() / seen_.largest().median() for seen_ in (seen, after)]
    assert ratios[1] < 0.5 * ratios[0]


def test_smoothing_scales_by_hand() -> None:
    """sqrt(16 / 4) = 2 at alpha 0.5; alpha 1 moves all of the range; dead channels keep 1."""
    maxima = torch.tensor([16.0, 16.0, 0.0]), torch.tensor([4.0, 0.0, 4.0])
    assert smoothing.scales(*maxima, smoothing.Settings()).tolist() == [2.0, 1.0, 1.0]
    assert smoothing.scales(*maxima, smoothing.Settings(alpha=1.0))[0] == 16.0

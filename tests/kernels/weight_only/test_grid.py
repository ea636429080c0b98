"""Grids of groups: schemes by hand, bounds of the error, clipping searches, RTN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.weight_only import clipping, rtn
from goldcrest.kernels.weight_only.grid import (
    GridSettings,
    bounds,
    decode,
    fake_quantize,
    group_columns,
    parameters,
    round_to_grid,
    round_to_grid_reference,
    ungroup_columns,
)
from tests.kernels.weight_only.problems import generator, layer

SCHEMES = ["asym", "sym", "sym_full", "sym_gptq"]


@pytest.mark.parametrize(
    ("scheme", "weights", "scale", "zero", "codes"),
    [
        # (5 + 2.5) / 15; -(-2.5) / 0.5; 0.25 / 0.5 is a tie and goes to the even 0.
        ("asym", [-2.5, 0.25, 1.3, 5.0], 0.5, 5, [0, 5, 8, 15]),
        ("asym", [1.5, 3.0, 0.8, 7.5], 0.5, 0, [3, 6, 2, 15]),  # 0 is in the range anyhow
        ("sym", [-3.5, 0.25, 0.8, 3.0], 0.5, 8, [1, 8, 10, 14]),  # 3.5 / 7
        ("sym_full", [4.0, -1.0, 0.8, -3.5], -0.5, 8, [0, 10, 6, 15]),  # -4 / 8: 4 is code -8
        ("sym_full", [-4.0, 1.0, -0.8, 3.5], 0.5, 8, [0, 10, 6, 15]),
        ("sym_gptq", [3.75, -3.75, 1.0, 0.0], 0.5, 8, [15, 0, 10, 8]),  # 2 x 3.75 / 15
    ],
)
def test_schemes_by_hand(scheme, weights, scale, zero, codes) -> None:
    got = round_to_grid(torch.tensor([weights]), GridSettings(scheme=scheme, group_size=4))
    assert got.scales.tolist() == [[scale]]
    assert got.zero_points.tolist() == [[zero]]
    assert got.codes.tolist() == [codes]


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    bits=st.integers(2, 8),
    size=st.sampled_from([-1, 1, 4, 5, 32]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    log_scale=st.integers(-6, 4),
    seed=st.integers(0, 99),
)
def test_error_is_half_a_step_and_zero_is_exact(
    scheme, bits, size, rows, columns, log_scale, seed
) -> None:
    """Inside the range; sym_full may lose the end of the shorter side, up to a whole step."""
    weight = torch.randn(rows, columns, generator=generator(seed)) * 10.0**log_scale
    weight[torch.rand(rows, columns, generator=generator(seed + 1)) < 0.2] = 0
    weight[0] = 0  # groups of nothing
    grid = GridSettings(scheme=scheme, bits=bits, group_size=size, ragged=True)
    quantized = round_to_grid(weight, grid)
    restored = quantized.decode()
    steps = quantized.scales.abs()[:, quantized.column_groups()]
    bound = 1.0 if scheme == "sym_full" else 0.5
    assert ((restored - weight).abs() <= steps * (bound + 1e-4)).all()
    assert (restored[weight == 0] == 0).all()
    assert (quantized.scales != 0).all()
    assert int(quantized.codes.max()) <= grid.top
    # Errors are compared, not values: the twin breaks ties (max|w| of sym_gptq) the other way.
    expected = (round_to_grid_reference(weight, grid) - weight).abs()
    assert ((restored - weight).abs() <= expected + steps * 1e-4).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_are_chosen_for_the_scales_as_stored(dtype: str) -> None:
    """Rounding with the float32 scale first and the scale afterwards would be no better."""
    weight = layer(0).weights["w"]
    stored = round_to_grid(weight, GridSettings(scale_dtype=dtype))
    assert str(stored.scales.dtype) == f"torch.{dtype}"
    later = round_to_grid(weight, GridSettings())
    groups = later.column_groups()
    rounded_later = decode(
        later.codes, later.scales.to(stored.scales.dtype), later.zero_points, groups
    )
    assert (stored.decode() - weight).square().sum() <= (rounded_later - weight).square().sum()
    with pytest.raises(ValueError, match="too large for scales in float16"):
        round_to_grid(weight * 1e8, GridSettings(scale_dtype="float16"))
    tiny = round_to_grid(weight * 1e-12, GridSettings(scale_dtype="float16"))
    assert (tiny.scales == 1).all()  # too small for a scale: all weights become 0
    assert (tiny.decode() == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantization_is_the_decoded_codes_and_lets_gradients_through(scheme: str) -> None:
    weight = layer(1).weights["w"].clone().requires_grad_()
    grid = GridSettings(scheme=scheme, group_size=8)
    grouped = group_columns(weight, 8)
    scales, zero_points = parameters(*bounds(grouped), grid)
    rounded = ungroup_columns(fake_quantize(grouped, scales, zero_points, grid.top), 32)
    assert torch.equal(rounded.detach(), round_to_grid(weight.detach(), grid).decode())
    (slope,) = torch.autograd.grad(
        fake_quantize(grouped, scales.detach(), zero_points.detach(), grid.top).sum(), weight
    )
    assert ((slope == 1) | (slope == 0)).all()  # 0 where clipped
    assert float((slope == 1).float().mean()) > 0.9


def test_smaller_groups_err_less_on_average() -> None:
    """Property 3: mean square error of RTN over layers, g from 8 to a whole row."""
    errors = dict.fromkeys((8, 16, 32, 64, -1), 0.0)
    for seed in range(10):
        weight = torch.randn(8, 128, generator=generator(seed))
        for size in errors:
            rounded = round_to_grid(weight, GridSettings(group_size=size)).decode()
            errors[size] += float((rounded - weight).square().sum())
    assert list(errors.values()) == sorted(errors.values())


def test_clipping_lowers_its_error_in_every_group_and_helps_an_outlier() -> None:
    """Expected: brute force over the shares; at two bits an outlier is worth clipping."""
    weight = torch.randn(4, 64, generator=generator(0)) * 0.1
    weight[:, 0] = 1.0
    grid = GridSettings(group_size=64, bits=2)
    grouped = group_columns(weight, 64)
    low, high = clipping.by_weight_error(grouped, grid)

    def error(low, high):
        rounded = fake_quantize(grouped, *parameters(low, high, grid), grid.top)
        return (rounded - grouped).abs().pow(2.4).sum(dim=2)

    own_low, own_high = bounds(grouped)
    tried = [error(own_low * p / 100, own_high * p / 100) for p in range(100, 20, -1)]
    torch.testing.assert_close(error(low, high), torch.stack(tried).amin(dim=0))
    assert (high <= own_high).all()
    assert (high < own_high).any()
    assert len(clipping.WEIGHT_SHARES) == 80
    assert clipping.WEIGHT_SHARES[-1] == pytest.approx(0.21)
    plain = rtn.quantize(layer(2), grid=GridSettings(bits=3), settings=rtn.Settings())
    clipped = rtn.quantize(layer(2), grid=GridSettings(bits=3), settings=rtn.Settings(clip=True))
    ours, theirs = (
        (item["w"].decode() - layer(2).weights["w"]).abs().pow(2.4).sum()
        for item in (clipped, plain)
    )
    assert ours < theirs


def test_output_clipping_is_the_best_of_its_shares_on_the_tokens_themselves() -> None:
    """Expected: each group's share of the outputs on all tokens, by brute force."""
    block = layer(3, rows=5)
    x, weight = block.inputs["w"].double(), block.weights["w"].double()
    grid = GridSettings(group_size=16, bits=3)
    grouped = group_columns(weight, 16)
    moments = clipping.group_moments(block.hessians["w"], 16)
    torch.testing.assert_close(moments[1], 2 * x[:, 16:].t() @ x[:, 16:])
    low, high = clipping.by_output_error(grouped, moments, grid)
    own_low, own_high = bounds(grouped)
    largest = torch.maximum(-own_low, own_high)

    def error(low, high):
        difference = fake_quantize(grouped, *parameters(low, high, grid), grid.top) - grouped
        outputs = torch.einsum("ngk,rgk->nrg", x.unflatten(1, (2, 16)), difference)
        return outputs.square().sum(dim=0)

    shares = [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]
    tried = [error(own_low.maximum(-p * largest), own_high.minimum(p * largest)) for p in shares]
    torch.testing.assert_close(error(low, high), torch.stack(tried).amin(dim=0))
    assert (clipping.group_moments(torch.eye(5), 4)[1] == torch.diag(torch.eye(4)[0])).all()


def test_errors_say_what_is_wrong() -> None:
    weight = torch.ones(2, 96)
    with pytest.raises(ValueError, match="96 input channels do not divide into groups of 64"):
        round_to_grid(weight, GridSettings(group_size=64))
    with pytest.raises(ValueError, match="take group_size 32, -1"):
        round_to_grid(weight, GridSettings(group_size=64))
    ragged = round_to_grid(weight, GridSettings(group_size=64, ragged=True))
    assert ragged.scales.shape == (2, 2)
    with pytest.raises(ValueError, match="NaN"):
        round_to_grid(weight * float("nan"), GridSettings())
    with pytest.raises(ValueError, match=r"\(rows, columns\)"):
        round_to_grid(weight[0], GridSettings())
    for wrong, message in (
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"group_size": 0}, "group_size"),
        ({"scheme": "symmetric"}, "scheme must be"),
        ({"scale_dtype": "float64"}, "scale_dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            GridSettings(**wrong)

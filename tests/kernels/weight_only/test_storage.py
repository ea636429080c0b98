"""Storage: the open layout, AutoGPTQ's and AutoAWQ's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from goldcrest.kernels.weight_only import awq_layout, gptq, gptq_layout, packing
from goldcrest.kernels.weight_only.grid import GridSettings, QuantizedWeight, round_to_grid
from tests.kernels.weight_only.problems import act_order, generator, layer, rounded


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Equal in every field, precision included."""
    for name in ("codes", "scales", "zero_points", "groups", "input_scales"):
        a, b = getattr(one, name), getattr(other, name)
        if (a is None) != (b is None):
            return False
        if a is not None and (a.dtype != b.dtype or not torch.equal(a, b)):
            return False
    return (one.bits, one.group_size) == (other.bits, other.group_size)


# --- the open layout ------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 6),
    columns=st.integers(1, 41),
    size=st.sampled_from([-1, 1, 4, 32]),
    scheme=st.sampled_from(["asym", "sym", "sym_full"]),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact(bits, rows, columns, size, scheme, scale_dtype, extras, seed) -> None:
    """Odd sizes too (property 1), through safetensors."""
    packed = rounded(
        seed, rows, columns, bits=bits, group_size=size, scheme=scheme, scale_dtype=scale_dtype
    )
    if extras:
        shuffled = packed.column_groups()[torch.randperm(columns, generator=generator(seed))]
        packed = replace(
            packed, groups=shuffled.to(torch.int32), input_scales=torch.rand(columns) + 0.5
        )
    state = load(save(packing.pack_state({"model.q": packed})))
    restored = packing.unpack_state({**state, "model.norm.weight": torch.ones(3)})
    assert list(restored) == ["model.q"]
    assert same(restored["model.q"], packed)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 30), data=st.data())
def test_bit_streams_equal_the_reference(bits, rows, columns, data) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    codes = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8)
    packed = packing.pack_codes(codes, bits)
    assert torch.equal(packed, packing.pack_codes_reference(codes, bits))
    assert torch.equal(packing.unpack_codes(packed, bits, columns), codes)


def test_bytes_by_hand() -> None:
    """1, 2, 3 in nibbles, low first: 0x21, 0x03. In 3 bits 011 010 001: 0b11010001, 0."""
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert packing.pack_codes(codes, 4).tolist() == [[0x21, 0x03]]
    assert packing.pack_codes(codes, 3).tolist() == [[0b11010001, 0]]


def test_sizes_are_what_the_issue_asks() -> None:
    """b / 8 + (s + b / 8) / g bytes a weight: group 128 takes at most 0.16 of float32."""
    for size, scheme, expected in (
        (128, "asym", 0.5 + 4.5 / 128),
        (128, "sym", 0.5 + 4 / 128),
        (32, "asym", 0.5 + 4.5 / 32),
    ):
        stored = packing.stored_bytes(rounded(0, 64, 512, group_size=size, scheme=scheme))
        assert stored == 64 * 512 * expected
        if size == 128:
            assert stored <= 0.16 * 4 * 64 * 512


def test_damage_is_refused() -> None:
    parts = packing.pack(rounded(0, 4, 33, group_size=16))
    for changed, message in (
        ({"codes": parts["codes"][:, :-1]}, "take rows of 17"),
        ({"codes": parts["codes"] | 0xF0}, "after the last code"),
        ({"codes": parts["codes"][:3]}, "4 rows"),
        ({"scales": parts["scales"].double()}, "scales are"),
        ({"scales": parts["scales"] * float("inf")}, "NaN or infinite"),
        ({"zeros": parts["zeros"].int()}, "uint8"),
        ({"header": parts["header"].int()}, "int64"),
        ({"header": torch.tensor([2, 4, 4, 33, 16])}, "layout version 2"),
        ({"header": torch.tensor([1, 9, 4, 33, 16])}, "describes no weight"),
        ({"groups": torch.full((33,), 3, dtype=torch.int32)}, "outside 0..2"),
        ({"input_scales": torch.zeros(33)}, "above 0"),
    ):
        with pytest.raises(ValueError, match=rf"'layer' is damaged.*{message}"):
            packing.unpack_state({f"layer.{k}": v for k, v in {**parts, **changed}.items()})
    with pytest.raises(ValueError, match="scales missing"):
        packing.unpack({key: value for key, value in parts.items() if key != "scales"})


# --- AutoGPTQ's layout ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.sampled_from([32, 64]),
    columns=st.sampled_from([32, 64, 96]),
    size=st.sampled_from([-1, 16, 32, 64]),
    form=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 99),
)
def test_gptq_round_trip_is_exact(bits, rows, columns, size, form, seed) -> None:
    """With scales chosen for float16, which is what the format stores."""
    given_ = rounded(seed, rows, columns, bits=bits, group_size=size, scale_dtype="float16")
    assume(form == "gptq_v2" or bool((given_.zero_points > 0).all()))
    tensors = load(save(gptq_layout.to_gptq(given_, form)))
    assert tensors["qweight"].shape == (columns * bits // 32, rows)
    assert tensors["qzeros"].shape == (given_.scales.shape[1], rows * bits // 32)
    assert same(gptq_layout.from_gptq(tensors, bits, size, form), given_)


def autogptq_weight(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """The (D, R) weight as AutoGPTQ's torch path reads it: shift, mask, plus one, g_idx."""
    shifts, mask = torch.arange(0, 32, bits), 2**bits - 1
    zeros = ((tensors["qzeros"][:, :, None] >> shifts) & mask).flatten(1) + 1
    codes = ((tensors["qweight"][:, None, :] >> shifts[:, None]) & mask).flatten(0, 1)
    index = tensors["g_idx"].long()
    return tensors["scales"].float()[index] * (codes - zeros[index])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("bits", "scheme"), [(2, "sym_gptq"), (4, "asym"), (8, "asym")])
def test_what_autogptq_reads_is_what_was_meant(bits: int, scheme: str, ordered: bool) -> None:
    problem = layer(0, 32, 64, outliers=True)
    given_ = gptq.quantize_weight(
        problem.weights["w"], problem.hessians["w"],
        GridSettings(bits=bits, group_size=16, scheme=scheme, scale_dtype="float16"),
        gptq.Settings(act_order=not ordered),
    )  # fmt: skip
    tensors = gptq_layout.to_gptq(given_)
    torch.testing.assert_close(autogptq_weight(tensors, bits).t(), given_.decode())
    restored = gptq_layout.from_gptq(tensors, bits, 16)
    assert same(restored, given_)
    config = gptq_layout.quantization_config([given_])
    assert config["desc_act"] is not ordered
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 16, bits == 2)


def test_gptq_words_by_hand() -> None:
    """Inputs 0..7 of output 0 have codes 1..8: 0x87654321; zero point 8 is stored as 7."""
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[0] = torch.arange(1, 9)
    given_ = QuantizedWeight(
        codes=codes, scales=torch.ones(8, 1), zero_points=torch.full((8, 1), 8).byte(),
        bits=4, group_size=8,
    )  # fmt: skip
    tensors = gptq_layout.to_gptq(given_)
    assert tensors["qweight"][0, 0].item() & 0xFFFFFFFF == 0x87654321
    assert tensors["qzeros"][0, 0].item() & 0xFFFFFFFF == 0x77777777
    second = gptq_layout.to_gptq(given_, "gptq_v2")
    assert second["qzeros"][0, 0].item() & 0xFFFFFFFF == 0x88888888


def test_gptq_three_bit_codes_cross_words() -> None:
    """Code 10 begins at bit 30: of 0b101, two bits end word 0 and the high one begins word 1."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101
    given_ = QuantizedWeight(
        codes=codes, scales=torch.ones(32, 1), zero_points=torch.full((32, 1), 4).byte(),
        bits=3, group_size=32,
    )  # fmt: skip
    words = gptq_layout.to_gptq(given_)["qweight"][:, 0]
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0b01 << 30, 0b1, 0]


def test_gptq_refuses_what_it_cannot_hold() -> None:
    positive = round_to_grid(torch.rand(32, 32) + 1, GridSettings())
    with pytest.raises(ValueError, match="zero point 0"):
        gptq_layout.to_gptq(positive)
    half = replace(positive, scales=positive.scales.half())
    tensors = gptq_layout.to_gptq(half, "gptq_v2")
    assert same(gptq_layout.from_gptq(tensors, 4, 32, "gptq_v2"), half)
    for wrong, message in (
        (rounded(0, 32, 36), "do not fill words"),
        (rounded(0, 32, 32, bits=5), "2, 3, 4 and 8 bits"),
        (replace(rounded(0, 32, 32), input_scales=torch.ones(32)), "fold them"),
        (replace(rounded(0, 32, 32), scales=torch.full((32, 1), 1e9)), "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq_layout.to_gptq(wrong)
    good = gptq_layout.to_gptq(rounded(0, 32, 64))
    with pytest.raises(ValueError, match="qzeros missing"):
        gptq_layout.from_gptq({k: v for k, v in good.items() if k != "qzeros"}, 4, 32)
    with pytest.raises(ValueError, match="do not fit 4 groups"):
        gptq_layout.from_gptq(good, 4, 16)
    with pytest.raises(ValueError, match="one of 2 groups"):
        gptq_layout.from_gptq({**good, "g_idx": good["g_idx"] + 1}, 4, 32)
    with pytest.raises(ValueError, match="must share"):
        gptq_layout.quantization_config([rounded(0, 8, 32), rounded(0, 8, 32, bits=3)])


# --- AutoAWQ's layout -----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from([8, 24, 64]),
    columns=st.sampled_from([32, 64, 96]),
    size=st.sampled_from([-1, 16, 32]),
    seed=st.integers(0, 99),
)
def test_awq_round_trip_is_exact(rows, columns, size, seed) -> None:
    given_ = rounded(seed, rows, columns, group_size=size, scale_dtype="float16")
    assert same(awq_layout.from_awq(load(save(awq_layout.to_awq(given_))), size), given_)


def test_awq_words_by_hand() -> None:
    """Outputs 0..7 with codes 0..7 stand as 0 2 4 6 1 3 5 7 from the lowest nibble."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 4)
    given_ = QuantizedWeight(
        codes=codes, scales=torch.ones(8, 1), zero_points=codes[:, :1].clone(),
        bits=4, group_size=4,
    )  # fmt: skip
    tensors = awq_layout.to_awq(given_)
    assert tensors["qweight"].tolist() == [[0x75316420]] * 4
    assert tensors["qzeros"].tolist() == [[0x75316420]]


def test_awq_refuses_what_it_cannot_hold() -> None:
    for wrong, message in (
        (rounded(0, 8, 32, bits=3), "4 bits"),
        (rounded(0, 9, 32), "by eights"),
        (rounded(0, 8, 48), "all of one size"),
        (act_order(), "neighbours"),
        (replace(rounded(0, 8, 32), input_scales=torch.ones(32)), "fold them"),
    ):
        with pytest.raises(ValueError, match=message):
            awq_layout.to_awq(wrong)
    good = awq_layout.to_awq(rounded(0, 8, 64))
    with pytest.raises(ValueError, match="are not"):
        awq_layout.from_awq(good, 16)
    with pytest.raises(ValueError, match="scales missing"):
        awq_layout.from_awq({k: v for k, v in good.items() if k != "scales"}, 32)
    with pytest.raises(ValueError, match="int32"):
        awq_layout.from_awq({**good, "qweight": good["qweight"].long()}, 32)

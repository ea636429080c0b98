"""Bitmask storage of sparse weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from goldcrest.kernels.sparsity import packing


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=3),
    share=st.floats(0, 1),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact(shape: list, share: float, kind: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 50).to(kind)
    weight[torch.rand(shape, generator=generator) < share] = 0
    restored = packing.unpack(packing.pack(weight))
    assert restored.dtype == kind
    assert torch.equal(restored, weight)


def test_bits_by_hand() -> None:
    """Bit 0 is the first weight: 1010 0000 1 -> 0b101, 0b1."""
    bits = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1]).bool()
    assert packing.pack_bits(bits).tolist() == [0b00000101, 0b00000001]
    assert torch.equal(packing.unpack_bits(packing.pack_bits(bits), [9]), bits)


def test_sizes_follow_the_cost_formula() -> None:
    """4 (1 - s) + 1/8 bytes per weight in float32, (1 - s) + 1/8 in int8 (spec 3.6)."""
    weight = torch.ones(1000)
    weight[:700] = 0
    assert packing.pack(weight).bytes == pytest.approx(1000 * packing.bytes_per_weight(0.7, 4))
    assert packing.pack(weight.to(torch.int8)).bytes == pytest.approx(
        1000 * packing.bytes_per_weight(0.7, 1)
    )
    # The spec's ideal speed-ups at s = 0.7: 3.0 and 9.4.
    assert round(4 / packing.bytes_per_weight(0.7, 4), 1) == 3.0
    assert round(4 / packing.bytes_per_weight(0.7, 1), 1) == 9.4


def test_state_survives_safetensors() -> None:
    state = {"a.weight": torch.eye(5), "a.bias": torch.ones(5)}
    packed = packing.pack_state(state, ["a.weight"])
    restored = packing.unpack_state(load(save(packed)))
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_damage_is_refused() -> None:
    packed = packing.pack_state({"w": torch.eye(3)}, ["w"])
    with pytest.raises(ValueError, match="lacks"):
        packing.unpack_state({k: v for k, v in packed.items() if k != "w.values"})
    with pytest.raises(ValueError, match=r"'w' is damaged.*announces"):
        packing.unpack_state({**packed, "w.values": torch.ones(2)})
    with pytest.raises(ValueError, match="beyond its last"):
        packing.unpack_bits(torch.tensor([255], dtype=torch.uint8), [3])
    with pytest.raises(ValueError, match="bytes"):
        packing.unpack_bits(torch.tensor([1, 1], dtype=torch.uint8), [3])

"""INT8 of a transformer: bytes and speed against float32, measured in turns in one run.

    python -m pytest tests/bench/test_int8_language_bench.py -s

prints the figures; the claims that are asserted are about bytes, and that a layer of 2048 channels
is faster on integers, for one token and for 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from goldcrest.kernels.quantization.int8 import grid_of_range, quantize_weight, weight_scales
from goldcrest.kernels.quantization.int8_cache import cache_bytes
from goldcrest.kernels.quantization.int8_linear import Int8Linear
from goldcrest.kernels.quantization.int8_transformer import Settings, quantize, state

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fastest(candidates: list[Callable[[], object]], rounds: int) -> list[float]:
    """Least CPU milliseconds of each, taken in turns: a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in candidates]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for taken, candidate in zip(times, candidates, strict=True):
                start = time.thread_time()
                candidate()
                taken.append(1e3 * (time.thread_time() - start))
    return [min(taken[1:]) for taken in times]


@pytest.mark.parametrize("width", [512, 1024, 2048])
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_layer(width: int, tokens: int) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(width, width), torch.randn(tokens, width)
    scales = weight_scales(dense.weight)
    codes = quantize_weight(dense.weight, scales)
    static, dynamic = (
        Int8Linear.from_codes(codes, scales, dense.bias, grid)
        for grid in (grid_of_range(float(x.min()), float(x.max())), None)
    )
    taken = fastest([lambda: dense(x), lambda: static(x), lambda: dynamic(x)], 40)
    print(
        f"\nD={width} tokens={tokens}: float32 {taken[0]:.3f} ms, static {taken[1]:.3f} "
        f"({taken[0] / taken[1]:.2f}x), dynamic {taken[2]:.3f} ({taken[0] / taken[2]:.2f}x)",
        end="",
    )
    if width == 2048:
        assert taken[1] < taken[0]


def decoding(model: LlamaForCausalLM, ids: torch.Tensor, tokens: int) -> DynamicCache:
    """Prefill, then `tokens` single tokens."""
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for place in range(tokens):
        model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    return cache


def test_a_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=12, num_key_value_heads=4,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    small = LlamaForCausalLM(config).eval()
    small.load_state_dict(dense.state_dict())
    ids = torch.randint(0, 4096, (1, 64))
    description = quantize(small, [{"input_ids": ids}], Settings(weights="rtn", smooth=False))
    bytes_of = [
        sum(each.numel() * each.element_size() for each in tensors.values())
        for tensors in (dense.state_dict(), state(small, description))
    ]
    prefill = fastest([lambda: decoding(dense, ids, 0), lambda: decoding(small, ids, 0)], 8)
    whole = fastest([lambda: decoding(dense, ids, 16), lambda: decoding(small, ids, 16)], 5)
    step = [(after - before) / 16 for before, after in zip(prefill, whole, strict=True)]
    with torch.inference_mode():
        caches = [cache_bytes(decoding(model, ids, 1)) for model in (dense, small)]
    for name, (before, after) in {
        "bytes": bytes_of, "cache bytes": caches, "prefill ms": prefill, "next token ms": step,
    }.items():  # fmt: skip
        print(
            f"\n{name}: float32 {before:.5g}, int8 {after:.5g}, ratio {before / after:.2f}", end=""
        )
    assert bytes_of[0] > 3.8 * bytes_of[1]
    assert caches[0] == 4 * caches[1]

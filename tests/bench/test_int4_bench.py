"""INT4 weights: size, speed of decoding, and what each method loses on real English text.

    python -m pytest tests/bench/test_int4_bench.py -s

prints the figures; the assertions are the claims: weights in groups of 128 take at most 0.16 of
float32, a token's product with a matrix that no cache holds is not slower than float32's, and GPTQ,
AWQ and AutoRound lose less than RTN on the same grid.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pydoc_data import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from goldcrest.kernels import weight_only
from goldcrest.kernels.weight_only import linear, matmul
from goldcrest.kernels.weight_only.checkpoint import quantized_bytes
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from goldcrest.kernels.weight_only.linear import WeightOnlyLinear
from goldcrest.kernels.weight_only.transformer import quantize

pytestmark = pytest.mark.slow


def fastest(candidates: list[Callable[[], object]], rounds: int) -> list[float]:
    """Least CPU milliseconds of each, taken in turns: a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for taken, candidate in zip(times, candidates, strict=True):
            start = time.thread_time()
            candidate()
            taken.append(1e3 * (time.thread_time() - start))
    return [min(taken) for taken in times]


def test_a_token_through_a_large_matrix() -> None:
    """One thread; weights in turn so that each product reads its matrix from memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in (1024, 4096):
            weight = torch.randn(size, size)
            layers = [
                WeightOnlyLinear.of(round_to_grid(weight, GridSettings(group_size=g)), None)
                for g in (32, 128)
            ]
            for tokens in (1, 4, linear.OPERATOR_TOKENS, 256):
                x = torch.randn(tokens, size)
                calls: list[Callable[[], object]] = [lambda x=x, weight=weight: x @ weight.t()]
                calls += [lambda x=x, layer=layer: layer(x) for layer in layers]
                calls += [lambda x=x, layer=layers[1]: matmul.tiled(x, layer._packed())]
                with torch.inference_mode():
                    fastest(calls, 2)
                    plain, g32, g128, tiled = fastest(calls, 7 if tokens < 64 else 3)
                print(
                    f"\n{size} x {size}, {tokens} tokens: float32 {plain:.2f} ms, int4 g32 "
                    f"{g32:.2f}, g128 {g128:.2f} ({plain / g128:.2f}x), by tiles {tiled:.2f}",
                    end="",
                )
                if size == 4096 and tokens == 1:
                    assert g128 <= plain
    finally:
        torch.set_num_threads(threads)


def text() -> Tensor:
    """The reference manual of Python, as bytes: 466 kB of English that every machine has."""
    manual = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.frombuffer(bytearray(manual.encode()), dtype=torch.uint8).long()


def trained() -> tuple[Any, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A byte-level Llama after a few hundred steps, calibration and held-out batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    manual = text()
    rows = manual[: len(manual) // 128 * 128].reshape(-1, 128)
    train, held = rows[:-200], rows[-200:]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        batch = train[torch.randint(0, len(train), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    calibration = [{"input_ids": row[None]} for row in train[:24]]
    return model.eval(), calibration, [{"input_ids": part} for part in held.split(25)]


@torch.inference_mode()
def nats(model: Any, batches: list[dict[str, Tensor]]) -> float:
    return sum(float(model(**b, labels=b["input_ids"]).loss) for b in batches) / len(batches)


SETTINGS: dict[str, dict[str, Any]] = {
    "teq": {"steps": 150, "learning_rate": 5e-3},
    "autoround": {"iterations": 100, "learning_rate": 5e-3},
}
"""Fewer steps than the defaults, which are for models a thousand times larger."""


def test_what_the_methods_lose_on_the_same_grid() -> None:
    model, calibration, held = trained()
    floating = nats(model, held)
    print(f"\nfloat32: {floating:.4f} nats per byte", end="")
    for bits, group in ((4, 128), (3, 128)):
        losses = {}
        for method in ("rtn", "gptq", "awq", "teq", "autoround"):
            settings = SETTINGS.get(method, {})
            quantized = copy.deepcopy(model)
            quantize(
                quantized, calibration, method=method,
                grid=GridSettings(bits=bits, group_size=group),
                settings=weight_only.load(method).Settings(**settings),
            )  # fmt: skip
            losses[method] = nats(quantized, held) - floating
        stored, plain = quantized_bytes(quantized.state_dict())
        shown = ", ".join(f"{name} {1e3 * loss:+.2f}" for name, loss in losses.items())
        print(f"\n{bits} bits g{group}: {shown} millinats; {stored / plain:.4f} of float32", end="")
        if (bits, group) == (4, 128):
            assert stored <= 0.16 * plain
        for method in ("gptq", "awq", "autoround"):
            assert losses[method] < losses["rtn"]

"""Small layers and blocks that the tests of weight-only quantization share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.weight_only import gptq
from goldcrest.kernels.weight_only.block import Block, of_linears, of_module
from goldcrest.kernels.weight_only.grid import GridSettings, QuantizedWeight, round_to_grid

SETS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linear layers of `TinyBlock` that read the same input."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, count: int = 96, columns: int = 32, outliers: bool = False) -> Tensor:
    """Inputs (N, D) of which half of the variance is shared; outliers: every 8th channel x 20."""
    g = generator(seed)
    x = torch.randn(count, 8, generator=g) @ torch.randn(8, columns, generator=g)
    x = x + 8**0.5 * torch.randn(count, columns, generator=g)
    if outliers:
        x[:, ::8] *= 20
    return x


def layer(seed: int, rows: int = 16, columns: int = 32, *, outliers: bool = False) -> Block:
    """One linear layer."""
    weight = torch.randn(rows, columns, generator=generator(1000 + seed))
    return of_linears({"w": weight}, tokens(seed, columns=columns, outliers=outliers))


class TinyBlock(nn.Module):
    """A decoder block of width 32: attention of two heads, gated feed-forward, RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        for name in "qkvo":
            setattr(self, name, nn.Linear(32, 32, bias=name == "v"))
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(S, T, 32) -> (S, T, 32)."""
        h = self.norm1(x)
        q, k, v = (getattr(self, n)(h).unflatten(2, (2, 16)).transpose(1, 2) for n in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def tiny_module(seed: int = 0) -> tuple[TinyBlock, Tensor]:
    """A block, in eval mode, and its inputs (12, 10, 32), some channels large."""
    torch.manual_seed(seed)
    module = TinyBlock().eval()
    with torch.no_grad():
        module.norm1.weight[::8] *= 8
        module.norm2.weight[::8] *= 8
    return module, torch.randn(12, 10, 32)


def tiny_block(seed: int = 0) -> Block:
    """`tiny_module` as a block of seven layers in four sets."""
    module, hidden = tiny_module(seed)
    return of_module(module, lambda call, i: call(hidden[i]), len(hidden), sets=SETS)


def rounded(seed: int, rows: int, columns: int, **changes) -> QuantizedWeight:
    """A random weight, rounded to nearest in groups of 32 unless told otherwise."""
    values = torch.randn(rows, columns, generator=generator(seed))
    return round_to_grid(values, GridSettings(ragged=True, **changes))


def act_order(rows: int = 32, columns: int = 96, size: int = 32) -> QuantizedWeight:
    """A weight whose groups lie apart."""
    problem = layer(0, rows, columns, outliers=True)
    return gptq.quantize_weight(
        problem.weights["w"], problem.hessians["w"], GridSettings(group_size=size),
        gptq.Settings(act_order=True),
    )  # fmt: skip

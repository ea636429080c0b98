"""Attention whose two products, Q K^T and P V, are products of integers.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3.4: both products are quantized, keys and values stay int8 in the cache.
The study leaves granularity open; here

    K ~ s_k,c k,   V ~ s_v,c v       per channel c of each head, calibrated, k and v in -127..127
    Q s_k / sqrt(D) ~ s_q q          one step per layer (or per token), q in -127..127
    exp(S - max S) ~ p / 65535       p = 256 h + l, h and l in 0..255, S = s_q q k^T + bias
    output_c = s_v,c (256 h v + l v)_c / sum p

A channel's step of K goes into Q before Q is rounded and that of V onto the output, so steps per
channel cost nothing. Probabilities are rounded before they are normalised: the largest of a row is
always 65535, however many keys share the attention, and dividing by the sum of the codes makes the
rounded row sum to one.

A probability has two digits of 8 bits, so P V is two products of bytes. One digit is not enough:
it is 0 below 1/510 of the row's largest. Where the first key draws 0.9 of the attention, as first
keys do in models like Llama, 511 others lose 93 % of theirs. Two digits are 0 below 1/131,070 of
the largest, so S keys together lose at most S / 131,070 of what the largest has.

Execution: torch has no batched int8 product on processors without VNNI that pays (per head, oneDNN
takes 40 times as long as float32 for its packing). The codes are therefore multiplied in float32
units, which hold whole numbers exactly up to 2^24: Q K^T is exact up to D = 1040, h V and l V up to
518 keys that are all at their limits; beyond, sums are rounded at 2^-24. `integer_products` is the
plain twin in int64. What is saved is the memory of the cache, not time.

Transformers call it by the name NAME, like "sdpa"; MPT, which multiplies by itself, gets a class.

B batch   H heads of queries   G heads of keys and values   T queries   S keys   D their channels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.mpt.modeling_mpt import MptAttention

from goldcrest.kernels.quantization.calibration import (
    ChannelMax,
    ChannelPercentile,
    MinMax,
    Moments,
)
from goldcrest.kernels.quantization.int8_cache import to_codes, use_int8_cache

NAME = "goldcrest_int8"
"""The attention implementation's name in transformers."""
LEVELS = 127
DIGIT = 256
_LEAST = 1e-12
_NOT_BUILT = ("softcap", "s_aux", "head_mask")
"""What some models change in an attention: caps on scores, sinks, weights of heads."""


class UnknownAttentionError(ValueError):
    """An attention that does what is not built here."""


class AttentionGrids(nn.Module):
    """Steps of one attention layer: buffers that a bundle stores.

    `key_scale`, `value_scale` (G, 1, D); `query_scale` () of queries times key steps, 0 if every
    query has a step of its own (dynamic).
    """

    key_scale: Tensor
    value_scale: Tensor
    query_scale: Tensor

    def __init__(self, heads: int, width: int) -> None:
        """Steps of one, to load a state into."""
        super().__init__()
        self.register_buffer("key_scale", torch.ones(heads, 1, width))
        self.register_buffer("value_scale", torch.ones(heads, 1, width))
        self.register_buffer("query_scale", torch.tensor(0.0))


class AttentionShape:
    """That an attention layer was called, and how its keys and values are made."""

    def __init__(self) -> None:
        self.shape = (0, 0)  # heads of keys and values, their channels

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Take queries (B, H, T, D), keys and values (B, G, S, D), on any device."""
        self.shape = (key.shape[1], key.shape[3])


class AttentionObserver(AttentionShape):
    """What calibration sees of one attention layer."""

    def __init__(self, share: float | None = None) -> None:
        """`share` of each channel's values lies within its steps; None: all of them."""
        super().__init__()
        self.moments = {name: Moments() for name in ("query", "key", "value")}
        self.ranges = {name: MinMax() for name in ("query", "key", "value")}
        self._largest: dict[str, ChannelMax | ChannelPercentile] = {
            name: ChannelMax() if share is None else ChannelPercentile(share)
            for name in ("query", "key", "value")
        }
        self._asking: Tensor | None = None
        self._asked: Tensor | None = None

    def real(self, queries: Tensor | None, keys: Tensor | None) -> None:
        """The tokens that count in what comes next: (B, T) of queries, (B, S) of keys and values,
        True on real ones; None: all of them."""
        self._asking, self._asked = queries, keys

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Take queries (B, H, T, D), keys and values (B, G, S, D)."""
        super().observe(query, key, value, scaling)
        heads, width = self.shape
        for name, x, mask in (
            ("query", query * scaling, self._asking),
            ("key", key, self._asked),
            ("value", value, self._asked),
        ):
            real = _real(x, mask)
            self.moments[name].observe(real)
            self.ranges[name].observe(real)
            # Query heads that share a key head lie side by side: (N, G, H / G, D).
            grouped = real.reshape(len(real), heads, -1, width)
            self._largest[name].observe(grouped.transpose(1, 2).flatten(0, 1))

    def grids(self, *, dynamic: bool) -> AttentionGrids:
        """The steps that cover what was seen, or the share of it that was asked for.

        Raises ValueError before anything was observed.
        """
        grids = AttentionGrids(*self.shape)
        grids.key_scale = self._step("key")
        grids.value_scale = self._step("value")
        if not dynamic:
            weighted = self._largest["query"].largest()[:, None] * grids.key_scale
            grids.query_scale = (weighted.max() / LEVELS).clamp(min=_LEAST)
        return grids

    def _step(self, name: str) -> Tensor:
        return (self._largest[name].largest() / LEVELS).clamp(min=_LEAST)[:, None]


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The real tokens (N, H, D) of (B, H, T, D), all without a mask (B, T) that fits."""
    tokens = x.transpose(1, 2)
    fits = mask is not None and mask.shape == tokens.shape[:2]
    return tokens[mask] if fits else tokens.flatten(0, 1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: (B, H, T, D) queries -> output (B, T, H, D).

    A module with `AttentionGrids` under `int8` computes on integers; keys and values may then be
    codes already, from an `Int8CacheLayer`. Any other module computes in floating point, and shows
    its inputs to the `AttentionShape` under `int8`, if there is one.

    Raises UnknownAttentionError for a model whose attention does what is not built here.
    """
    for name in _NOT_BUILT:
        if keywords.get(name) is not None:
            raise UnknownAttentionError(
                f"{type(module).__name__} computes with {name}, which INT8 attention does not "
                "know; set settings.attention to false"
            )
    grids = getattr(module, "int8", None)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(grids, AttentionGrids):
        if isinstance(grids, AttentionShape):
            grids.observe(query, key, value, factor)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, **keywords,
        )  # fmt: skip
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = _bias(query, key, attention_mask, position_bias, causal=causal)
    output = integer_attention(grids, query * factor, key, value, bias)
    return output.transpose(1, 2).contiguous().to(query.dtype), None


def _bias(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    *,
    causal: bool,
) -> Tensor | None:
    """What is added to the scores, (B or 1, H or 1, T, S): positions, and masks as -inf's kin."""
    length = query.shape[2]
    if mask is None and causal and length > 1:
        offset = key.shape[2] - length
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(offset)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    return position_bias + mask


def integer_attention(
    grids: AttentionGrids, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """(B, H, T, D) scaled queries, (B, G, S, D) keys and values (float or codes) -> (B, H, T, D).

    Computed in float32 units, see the head of this file.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    keys, values = _codes(key, grids.key_scale), _codes(value, grids.value_scale)
    by_group = query.float().reshape(batch, groups, -1, width) * grids.key_scale
    queries, query_scale = query_codes(by_group, grids.query_scale)
    scores = (queries @ keys.float().transpose(2, 3)) * query_scale
    scores = scores.reshape(batch, heads, length, -1)
    digits = probability_digits(scores if bias is None else scores + bias)
    units = values.float()
    high, low = (each.reshape(batch, groups, -1, each.shape[-1]) @ units for each in digits)
    output = ((DIGIT * high + low) * grids.value_scale).reshape(batch, heads, length, -1)
    return output / probability_totals(digits)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return x if x.dtype == torch.int8 else to_codes(x, scale)


def query_codes(query: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -127..127 as float32, and their step: `scale`, or per query where that is 0."""
    if not float(scale) > 0:
        scale = (query.abs().amax(dim=-1, keepdim=True) / LEVELS).clamp(min=_LEAST)
    return torch.round(query / scale).clamp_(-LEVELS, LEVELS), scale


def probability_digits(scores: Tensor) -> tuple[Tensor, Tensor]:
    """High and low digits 0..255 of exp(S - max S), float32, (..., S) each."""
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    codes = torch.round(shifted.exp_() * (DIGIT**2 - 1))
    high = torch.floor(codes / DIGIT)
    return high, codes.sub_(high, alpha=DIGIT)


def probability_totals(digits: tuple[Tensor, Tensor]) -> Tensor:
    """Sums of the codes (..., 1): digit by digit, as the codes' own would be beyond 2^24."""
    high, low = (digit.sum(dim=-1, keepdim=True) for digit in digits)
    return DIGIT * high + low


def integer_products(left: Tensor, right: Tensor) -> Tensor:
    """The plain twin of the products above: whole numbers multiplied and summed in int64."""
    return left.long() @ right.long()


class Int8MptAttention(MptAttention):
    """MPT's attention, which does not ask transformers for a function, on integers or observed."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """(B, T, C) hidden states -> the same; the mask is True where a key is hidden."""
        batch, length = hidden_states.shape[:2]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            each.reshape(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
            for each in mixed.chunk(3, dim=2)
        )
        if past_key_values is not None and self.layer_idx is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        bias = None
        if position_bias is not None:
            behind = max(0, position_bias.shape[2] - key.shape[2])
            bias = position_bias[:, :, behind:][None]
        visible = None if attention_mask is None else ~attention_mask.bool()
        context, _ = attention(
            self, query, key, value, visible, scaling=self.softmax_scale, is_causal=False,
            position_bias=bias,
        )  # fmt: skip
        return self.out_proj(context.reshape(batch, length, -1)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def use_attention(model: PreTrainedModel) -> None:
    """Let every attention of the model go through `attention`, in floating point at first."""
    for module in model.modules():
        if type(module) is MptAttention:
            module.__class__ = Int8MptAttention  # same state, another way to multiply
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = NAME


def put_grids(module: nn.Module, grids: AttentionGrids) -> None:
    """Let an attention module compute on integers and keep its cache as int8."""
    if hasattr(module, "int8"):
        del module.int8
    module.int8 = grids
    use_int8_cache(module)

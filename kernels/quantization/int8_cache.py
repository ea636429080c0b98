"""Keys and values of past tokens as int8: a layer of a transformers cache.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3.4 (both attention products are quantized, hence the cache is int8).

Each channel of each head has a step from calibration, so a token costs one byte per channel and
nothing else, and what is stored can be multiplied as it is: `update` gives codes back, which
`int8_attention` multiplies. New tokens are written behind the old ones into storage that doubles
when it is full: appending does not copy the past.

`use_int8_cache` makes an attention module put such a layer where the cache it is called with has
an empty one, so that `generate` needs no other cache than the one it makes itself.

B batch (beams)   H heads of keys and values   T tokens   D channels of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

_FIRST_CAPACITY = 64
"""Tokens that storage has room for when the first come."""


def to_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 of (B, H, T, D) on symmetric grids with steps (H, 1, D)."""
    return torch.round(x.float() / scale).clamp_(-127, 127).to(torch.int8)


class Int8CacheLayer(DynamicLayer):
    """One layer's past; `keys` and `values` are views (B, H, T, D) int8 of its storage."""

    def __init__(self, key_scale: Tensor, value_scale: Tensor) -> None:
        """Steps (H, 1, D) of keys and of values."""
        super().__init__()
        self.key_scale, self.value_scale = key_scale, value_scale
        self._stored: tuple[Tensor, Tensor] | None = None  # (B, H, capacity, D) each

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make storage for the shapes of the first keys and values."""
        self.dtype, self.device = torch.int8, key_states.device
        capacity = max(_FIRST_CAPACITY, key_states.shape[2])
        self._store(
            key_states.new_empty(_with_tokens(key_states, 0), dtype=torch.int8),
            value_states.new_empty(_with_tokens(value_states, 0), dtype=torch.int8),
            capacity,
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens (B, H, T, D) float; gives all codes so far, (B, H, T', D) int8."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        if self._stored is None or after > self._stored[0].shape[2]:
            self._store(self.keys, self.values, 2 * after)
        assert self._stored is not None
        keys, values = self._stored
        keys[:, :, before:after] = to_codes(key_states, self.key_scale)
        values[:, :, before:after] = to_codes(value_states, self.value_scale)
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam b continues what beam `beam_idx[b]` was, in place."""
        if self.get_seq_length() > 0:
            assert self.keys is not None
            assert self.values is not None
            self.keys.copy_(self.keys.index_select(0, beam_idx))
            self.values.copy_(self.values.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._stored = None  # of another batch size: made anew at the next token

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._stored = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._stored = None

    def _store(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Storage of `capacity` tokens that begins with the given ones."""
        stored = []
        for codes in (keys, values):
            room = codes.new_empty(_with_tokens(codes, capacity))
            room[:, :, : codes.shape[2]] = codes
            stored.append(room)
        self._stored = (stored[0], stored[1])
        length = keys.shape[2]
        self.keys, self.values = stored[0][:, :, :length], stored[1][:, :, :length]


class Int8SlidingCacheLayer(DynamicSlidingWindowLayer):
    """A layer's past as far as its window reaches back, (B, H, T, D) int8.

    The window is transformers' own code, which concatenates: what is copied for a new token is no
    more than the window.
    """

    def __init__(self, key_scale: Tensor, value_scale: Tensor, sliding_window: int) -> None:
        """Steps (H, 1, D) of keys and of values; tokens that a query sees, itself included."""
        super().__init__(sliding_window=sliding_window)
        self.key_scale, self.value_scale = key_scale, value_scale

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens (B, H, T, D) float; gives the codes of all that they see, int8."""
        keys = to_codes(key_states, self.key_scale)
        return super().update(keys, to_codes(value_states, self.value_scale), *args, **kwargs)


def _with_tokens(x: Tensor, tokens: int) -> tuple[int, int, int, int]:
    batch, heads, _, width = x.shape
    return batch, heads, tokens, width


def use_int8_cache(attention: nn.Module) -> RemovableHandle:
    """Let `attention` keep its past as int8 in whatever cache it is called with.

    The module has a `layer_idx` and, as `int8`, its `int8_attention.AttentionGrids`. A cache that
    already holds float tokens of this layer is left alone.
    """
    return attention.register_forward_pre_hook(_prepare_cache, with_kwargs=True)


def _prepare_cache(
    attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    given = (keywords.get(name) for name in ("past_key_values", "layer_past"))
    cache = next((each for each in given if each is not None), None)
    if isinstance(cache, EncoderDecoderCache):
        readers = ("key_value_states", "encoder_hidden_states")
        crosses = any(keywords.get(name) is not None for name in readers)
        cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
    place = getattr(attention, "layer_idx", None)
    if isinstance(cache, Cache) and place is not None:
        grids: Any = attention.int8
        _replace_empty_layer(cache, place, grids.key_scale, grids.value_scale)


def _replace_empty_layer(cache: Cache, place: int, key_scale: Tensor, value_scale: Tensor) -> None:
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= place:
            cache.layers.append(cache.layer_class_to_replicate())
    now = cache.layers[place]
    if type(now) is DynamicLayer and now.get_seq_length() == 0:
        cache.layers[place] = Int8CacheLayer(key_scale, value_scale)
    elif type(now) is DynamicSlidingWindowLayer and now.get_seq_length() == 0:
        cache.layers[place] = Int8SlidingCacheLayer(key_scale, value_scale, now.sliding_window)


def cache_bytes(cache: Cache | EncoderDecoderCache) -> int:
    """Bytes of the keys and values that a cache holds for its tokens."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(each.numel() * each.element_size() for each in held if each is not None)

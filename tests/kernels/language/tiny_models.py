"""Freshly initialised transformers of every architecture that the tests run through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 64
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**settings: Any) -> LlamaForCausalLM:
    """Grouped-query attention, RMSNorm, gated feed-forward."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **heads, **_ENDS, **settings})
    return LlamaForCausalLM(config)


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    """Transposed linear layers, LayerNorm, learned positions."""
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **{**sizes, **_ENDS, **settings}))


def mpt(**settings: Any) -> MptForCausalLM:
    """Fused query, key and value; ALiBi."""
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
    return MptForCausalLM(MptConfig(vocab_size=VOCABULARY, **{**sizes, **_ENDS, **settings}))


def opt(**settings: Any) -> OPTForCausalLM:
    """Learned positions, and a feed-forward part that reads rows and positions as one axis."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "word_embed_proj_dim": 32}
    lengths = {"num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCABULARY, **{**sizes, **lengths, **_ENDS, **settings})
    )


def t5(**settings: Any) -> T5ForConditionalGeneration:
    """An encoder and a decoder, relative positions that the first block makes for all."""
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 3, "num_heads": 4, "d_kv": 8}
    ends = {**_ENDS, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, **{**sizes, **ends, **settings})
    )


def bert(**settings: Any) -> BertForMaskedLM:
    """An encoder whose norms come after the residual sums."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "pad_token_id": 0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **{**sizes, **heads, **settings}))


def whisper(**settings: Any) -> WhisperForConditionalGeneration:
    """Speech in, text out."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 80}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    lengths = {"max_source_positions": 50, "max_target_positions": 40}
    ends = {
        **_ENDS,
        "decoder_start_token_id": 1,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
    }
    settings = {**sizes, **heads, **widths, **lengths, **ends, **settings}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=VOCABULARY, **settings))


def mixtral(**settings: Any) -> MixtralForCausalLM:
    """A mixture of experts, which is not compressed: not one of `MODELS`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=VOCABULARY, **{**sizes, **heads, **_ENDS, **settings})
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (llama, gpt2, mpt, opt, t5, bert, whisper)
}


def batch(architecture: str, *, rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a model; the last row is padded on the right from two thirds on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if architecture == "whisper":
        speech = torch.randn(rows, 80, 100, generator=generator)
        return {"input_features": speech, "decoder_input_ids": ids}
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, 2 * length // 3 :] = 0
    made = {"input_ids": ids * mask, "attention_mask": mask}
    return made | ({"labels": ids} if architecture == "t5" else {})

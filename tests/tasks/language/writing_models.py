"""Tiny language models with tokenizers that know every text, as loaded bundles."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldcrest.tasks.language.bundle import LanguageModel
from tests.kernels.language import tiny_models

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]


def byte_tokenizer(**tokens: str | None) -> PreTrainedTokenizerFast:
    """A token per byte, special ones first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = dict(zip(("pad", "bos", "eos", "mask"), SPECIAL, strict=True)) | tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{key}_token": value for key, value in names.items()}
    )


def tiny_bundle(architecture: str, *, seed: int = 0, **settings: Any) -> LanguageModel:
    """A tiny model with random weights, sharp enough that its choices have no ties."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = tiny_models.MODELS[architecture](**settings).eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(3.0)
    families = {"t5": "seq2seq", "bert": "masked", "whisper": "speech"}
    family = families.get(architecture, "causal")
    return LanguageModel({"name": "dense", "family": family}, model, tokenizer)

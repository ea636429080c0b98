"""Tiny language models with tokenizers that know every text, as loaded bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldcrest.cluster.api import Config, Output, task
from goldcrest.kernels.language.architectures import own_state
from goldcrest.tasks.language.bundle import LanguageModel, write_bundle
from tests.kernels.language import tiny_models

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]
FAMILIES = {"t5": "seq2seq", "bert": "masked", "whisper": "speech"}


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
    family = FAMILIES.get(architecture, "causal")
    return LanguageModel({"name": "dense", "family": family}, model, tokenizer)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter, digit or end of line, 64 with the special ones: all it writes prints."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW0123456789", "Ċ"]
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


class BundleToyConfig(Config):
    """Which tiny model is written."""

    name: str = "dense"
    architecture: str = "llama"
    sparsity: float = 0.0
    tokenizer: str = ""


@task(seeded=False)
def bundle_toy(cfg: BundleToyConfig, out: Output) -> None:
    """A bundle of a tiny random model; sparse ones lack the weights that are least."""
    torch.manual_seed(0)
    model = tiny_models.MODELS[cfg.architecture]()
    tensors = {name: 3.0 * value for name, value in own_state(model).items()}
    pruned = [name for name, value in tensors.items() if value.ndim == 2 and cfg.sparsity]
    for name in pruned:
        magnitudes = tensors[name].abs()
        tensors[name][magnitudes < magnitudes.quantile(cfg.sparsity)] = 0.0
    write_bundle(
        out,
        name=cfg.name,
        family=FAMILIES.get(cfg.architecture, "causal"),
        config=model.config,
        tensors=tensors,
        tokenizer=Path(cfg.tokenizer),
        facts={},
        packed=pruned,
    )

"""A language that is learned in seconds: numbers that count up, with a tokenizer of 64 words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldcrest.cluster.artifact import Artifact, describe_files
from goldcrest.tasks.data.tokens import TokenRow, TokenWriter

WORDS = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "causal": {"architecture": "llama", "settings": LLAMA},
    "seq2seq": {"architecture": "t5", "settings": T5, "family": "seq2seq"},
    "masked": {"architecture": "bert", "settings": BERT, "family": "masked"},
}


def committed(folder: Path, step: str) -> Artifact:
    """The artifact of a folder's files."""
    manifest = {"key": "0" * 64, "step": step, "files": describe_files(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.at(folder)


def tokenizer_artifact(folder: Path, *, words: int = WORDS) -> Artifact:
    """A tokenizer of `words` words, the special ones first."""
    names = [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), words))]
    backend = Tokenizer(
        models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )
    made.save_pretrained(folder / "tokenizer")
    return committed(folder, "tokenizer")


def counting_rows(rows: int, seed: int, *, longest: int = 7) -> list[TokenRow]:
    """A prompt of two or three numbers, and the numbers that follow; the end of the text."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        first, size = int(rng.integers(4, WORDS - longest - 3)), int(rng.integers(2, longest))
        told = int(rng.integers(2, 4))
        numbers = np.arange(first, first + told + size, dtype=np.int32)
        answer = np.append(numbers[told:], np.int32(2))
        made.append(TokenRow(numbers[:told], answer, np.zeros(0, np.int32)))
    return made


def packed_rows(rows: int, seed: int) -> list[TokenRow]:
    """Two documents that count up in every row."""
    made = []
    for one, two in zip(counting_rows(rows, seed), counting_rows(rows, seed + 1), strict=True):
        texts = [np.concatenate([row.prompt, row.answer]) for row in (one, two)]
        starts = np.array([0, len(texts[0])], np.int32)
        made.append(TokenRow(np.zeros(0, np.int32), np.concatenate(texts), starts))
    return made


def tokens_artifact(
    folder: Path, *, family: str = "causal", rows: int = 48, packed: bool = False
) -> Artifact:
    """Token files of a training and a validation split."""
    folder.mkdir(parents=True)
    make = packed_rows if packed else counting_rows
    for seed, (split, count) in enumerate({"train": rows, "validation": 16, "test": 16}.items()):
        with TokenWriter(folder / f"{split}.arrow") as writer:
            for number, row in enumerate(make(count, 10 * seed) if count else []):
                writer.write(row, example=number, characters=len(row), size=len(row))
    (folder / "facts.json").write_text(json.dumps({"family": family}))
    return committed(folder, "tokens")

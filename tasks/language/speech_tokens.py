"""Tokens of speech: the transcripts of a corpus as labels, and what the encoder hears of each.

    labels      [prefix] text [eos]                (the decoder starts with a token of the model's)
    features    Whisper's log-mel, 10 ms a frame   (kernels/frontend/whisper_mel.py)

The prefix are the special tokens that a trained Whisper is told language and task by; a tokenizer
that was trained here has none. They are labels like others, as in the recipe of the transformers
library by which the study trained (spec "sparse fine-tuning", section 4).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from goldcrest.cluster.api import Artifact, InputError, Output
from goldcrest.tasks.data.audio import from_pcm16
from goldcrest.tasks.data.frames import FrameWriter
from goldcrest.tasks.data.speech_rows import features_file
from goldcrest.tasks.data.tokens import TokenRow, TokenWriter
from goldcrest.tasks.language.examples import SPLITS, Split, count_examples
from goldcrest.tasks.language.packing import EncodedText
from goldcrest.tasks.language.tokenizer import transcript_prefix
from goldcrest.tasks.language.tokens import (
    TokensConfig,
    encoded_texts,
    loaded_tokenizer,
    room_for,
)

_BATCH_ROWS = 32  # utterances handed to one worker at a time: 31 MB of half a minute each
_SPECTRA = 8  # of which spectra are in memory at once
_COUNTS = (
    *("examples", "rows", "tokens", "predicted", "characters", "bytes"),
    *("dropped", "truncated", "longest", "length_95", "frames"),
)
_NO_PROMPT = np.zeros(0, np.int32)


@dataclass(frozen=True)
class _Spoken:
    """An utterance of the corpus: its id, text, and audio as 16-bit PCM at 16 kHz."""

    id: str
    text: str
    audio: bytes


def write_speech(cfg: TokensConfig, corpus: Artifact, folder: str, out: Output) -> dict[str, Any]:
    """Write the rows of every split; returns what was counted of each.

    `folder` holds the tokenizer. Raises InputError for a corpus without audio.
    """
    make = functools.partial(encode_speech, folder=folder, cfg=cfg)
    total = sum(count_examples(corpus, split) for split in SPLITS)
    facts: dict[str, dict[str, int]] = {}
    done = 0
    for split in SPLITS:
        counts, lengths = dict.fromkeys(_COUNTS, 0), Counter[int]()
        path = out.file(f"{split}.arrow")
        with (
            TokenWriter(path) as rows,
            FrameWriter(features_file(path), cfg.speech.mel_bins, cfg.speech.dtype) as frames,
        ):
            batches = _batches(corpus, split)
            for batch in out.runtime.map(make, batches, cpus=cfg.workers_cpus, note="features"):
                _write(batch, rows, frames, counts, cfg)
                lengths.update(len(text) for _, text, _ in batch)
                done += len(batch)
                out.progress(done / max(total, 1), f"{done} utterances")
            counts["frames"] = frames.frames
            counts["length_95"] = room_for(lengths)
        facts[split] = counts
    return facts


def _batches(corpus: Artifact, split: Split) -> Iterator[list[_Spoken]]:
    import pyarrow.parquet as pq

    for shard in corpus.shards(split):
        with pq.ParquetFile(shard) as file:
            if "audio" not in file.schema_arrow.names:
                raise InputError(
                    "the corpus holds texts without audio, and a speech model reads audio",
                    hint="set tokens.family to causal, seq2seq or masked, or give recordings",
                )
            for batch in file.iter_batches(_BATCH_ROWS, columns=["id", "answer", "audio"]):
                yield [_Spoken(r["id"], r["answer"], r["audio"]) for r in batch.to_pylist()]


def encode_speech(
    batch: Sequence[_Spoken], *, folder: str, cfg: TokensConfig
) -> list[tuple[str, EncodedText, np.ndarray]]:
    """Id, labels and features (T, M) of every utterance; on a worker."""
    import torch

    from goldcrest.kernels.frontend.whisper_mel import features

    tokenizer = loaded_tokenizer(folder)
    assert tokenizer.eos_token_id is not None
    begin, end = transcript_prefix(tokenizer), [tokenizer.eos_token_id]
    texts = encoded_texts(tokenizer, [each.text for each in batch], begin, end)
    waves = [torch.from_numpy(from_pcm16(each.audio)) for each in batch]
    heard = [
        each.numpy().astype(cfg.speech.dtype)
        for start in range(0, len(waves), _SPECTRA)
        for each in features(waves[start : start + _SPECTRA], cfg.speech.mel_bins)
    ]
    names = [each.id for each in batch]
    return list(zip(names, texts, heard, strict=True))


def _write(
    batch: Sequence[tuple[str, EncodedText, np.ndarray]],
    rows: TokenWriter,
    frames: FrameWriter,
    counts: dict[str, int],
    cfg: TokensConfig,
) -> None:
    """Write what is not too long; a transcript that is cut off says less than is heard."""
    kept: list[tuple[str, bytes]] = []
    for name, text, heard in batch:
        number = counts["examples"]
        counts["examples"] += 1
        if len(text) > cfg.length and cfg.overlong == "drop":
            counts["dropped"] += 1
            continue
        size = min(len(text), cfg.length)
        counts["truncated"] += size < len(text)
        characters, utf8 = int(text.characters[size - 1]), int(text.bytes[size - 1])
        row = TokenRow(_NO_PROMPT, text.tokens[:size])
        rows.write(row, example=number, characters=characters, size=utf8)
        kept.append((name, heard.tobytes()))
        for key, value in (
            *(("rows", 1), ("tokens", size), ("predicted", size)),
            *(("characters", characters), ("bytes", utf8)),
        ):
            counts[key] += value
        counts["longest"] = max(counts["longest"], size)
    if kept:
        frames.write([name for name, _ in kept], [0] * len(kept), [data for _, data in kept])

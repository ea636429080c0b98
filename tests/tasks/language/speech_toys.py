"""A spoken language that is learned in seconds: a word is a chord, a text two or three words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from goldcrest.cluster.api import Artifact
from goldcrest.tasks.language.prepare_speech import SpeechCorpusConfig, prepare_speech
from goldcrest.tasks.language.tokenizer import TokenizerConfig, tokenizer
from goldcrest.tasks.language.tokens import TokensConfig, tokens

RATE = 16_000
WORDS = {"a": (300.0, 1100.0), "b": (700.0, 1900.0), "c": (450.0, 2600.0), "d": (950.0, 3300.0)}
WINDOW = 0.6  # seconds that the tiny Whisper hears
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 30,
    "max_target_positions": 12,
}
MODEL = {"family": "speech", "architecture": "whisper", "settings": WHISPER}


def spoken(text: str, rng: np.random.Generator) -> np.ndarray:
    """(N,) float32: 0.15 s a word, in a voice that differs a little each time."""
    time = np.arange(int(0.15 * RATE)) / RATE
    pitch = rng.uniform(0.97, 1.03)
    words = [sum(np.sin(2 * np.pi * pitch * f * time) for f in WORDS[word]) for word in text]
    wave = 0.1 * np.hanning(len(time)) * np.array(words)
    noisy = wave.ravel() + 0.001 * rng.standard_normal(wave.size)
    return noisy.astype(np.float32)


def corpus_folder(root: Path, rows: int = 96, *, speakers: int = 6, seed: int = 0) -> Path:
    """A folder with metadata.jsonl; file NNN.wav, speakers taking turns."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(rows):
        text = "".join(rng.choice(list(WORDS), int(rng.integers(2, 4))))
        name = f"{number:03d}.wav"
        soundfile.write(root / name, spoken(text, rng), RATE)
        speaker = f"s{number % speakers}"
        lines.append(json.dumps({"file_name": name, "text": text, "speaker": speaker}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def chain(run: Any, folder: Path, **changes: Any) -> tuple[Artifact, Artifact, Artifact]:
    """Corpus, tokenizer (a token per byte) and tokens of the toy language."""
    cfg = SpeechCorpusConfig(paths=(str(folder),), max_seconds=WINDOW, apart="recordings")
    corpus = run(prepare_speech, cfg)
    words = run(tokenizer, TokenizerConfig(method="bytes"), corpus)
    rows = run(tokens, TokensConfig(**{"family": "speech", "length": 8, **changes}), corpus, words)
    return corpus, words, rows

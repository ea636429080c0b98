"""What a bundle makes of examples: the loss of every row, an answer to every prompt.

These functions run in workers, one shard at a time; each loads the bundle anew. What they give is
summed up in evaluate.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.language.examples import Example
from goldcrest.tasks.language.generation import GenerationSettings

if TYPE_CHECKING:
    from torch import Tensor

    from goldcrest.kernels.metrics.additive import Additive
    from goldcrest.kernels.metrics.perplexity import RowSums
    from goldcrest.tasks.data.tokens import TokenRow
    from goldcrest.tasks.language.bundle import LanguageModel
    from goldcrest.tasks.language.collator import Collator
    from goldcrest.tasks.language.generation import Generator

CONTINUED_WORDS = 12
"""Words of a text without a prompt that a model is given to go on from."""
CONTINUED_BYTES = 128
"""The most of them in UTF-8: some scripts have no spaces, and a tokenizer may know only bytes."""
LOWER_IS_BETTER = {"perplexity", "bits_per_char", "bits_per_byte", "ter", "wer", "cer"}
ON_TOKENS = ("perplexity", "bits_per_char", "bits_per_byte", "entropy")
SPEECH_METRICS = {"wer", "cer"}


def text_metric(name: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Additive]:
    """A metric of answers (N,) against references (N lists), by its name in configs."""
    from goldcrest.kernels.metrics import answers, rouge, transcription, translation

    known: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Additive]] = {
        "exact_match": answers.exact_match,
        "gsm8k": answers.gsm8k,
        "bleu": translation.bleu,
        "chrf": translation.chrf,
        "ter": translation.ter,
        "rouge1": functools.partial(rouge.rouge_n, 1),
        "rouge2": functools.partial(rouge.rouge_n, 2),
        "rougeL": rouge.rouge_l,
        "wer": transcription.word_error_rate,
        "cer": transcription.character_error_rate,
    }
    return known[name]


def check_references(name: str, references: Sequence[Sequence[str]]) -> None:
    """ValueError for references that the metric can't be computed with, whatever the answers."""
    from goldcrest.kernels.metrics import answers

    if name == "gsm8k":
        answers.final_numbers(references)


def load_on(folder: Path, device: str) -> LanguageModel:
    """The bundle in a folder, its model on a device ("cpu", "cuda"), or where `device_for` says.

    Batches belong on the model's own device, not on the one that was asked for.
    """
    from torch import nn

    from goldcrest.tasks.language.bundle import device_for, load_bundle

    bundle = load_bundle(folder)
    nn.Module.to(bundle.model, device_for(bundle.facts, device))
    return bundle


@dataclass(frozen=True)
class LossShard:
    """Rows of a token file that one worker scores with one bundle."""

    folder: Path
    tokens: Path
    rows: np.ndarray  # (n,) places in the token file
    batch_rows: int
    device: str


def row_losses(shard: LossShard) -> np.ndarray:
    """(n, 5) float64 by row: NLL and entropy in nats; tokens, characters, bytes."""
    from goldcrest.tasks.language.collator import make_collator
    from goldcrest.tasks.language.documents import check_reading
    from goldcrest.tasks.language.rows import check_speech, open_rows

    bundle = load_on(shard.folder, shard.device)
    reader = open_rows(shard.tokens, bundle.facts["family"])
    check_speech(reader, bundle.model.config)
    collate = make_collator(bundle.facts["family"], bundle.tokenizer, bundle.model.config)
    if bundle.facts.get("quantization") is None:  # of whose rounding neighbours are a part
        check_reading(bundle.model, collate, reader)
    found = np.zeros((len(shard.rows), 5))
    # Rows of similar length share a batch: less padding.
    order = np.argsort([-reader.lengths[row] for row in shard.rows], kind="stable")
    for start in range(0, len(order), shard.batch_rows):
        places = order[start : start + shard.batch_rows]
        rows = [reader[int(shard.rows[place])] for place in places]
        batch = loss_batch(bundle, collate, rows)
        device = bundle.model.device
        sums = batch_sums(bundle, {key: value.to(device) for key, value in batch.items()})
        found[places, :3] = np.stack([each.cpu().numpy() for each in sums], axis=1)
    found[:, 3], found[:, 4] = reader.characters[shard.rows], reader.bytes[shard.rows]
    return found


def loss_batch(
    bundle: LanguageModel, collate: Collator, rows: Sequence[TokenRow]
) -> dict[str, Tensor]:
    """Rows of a token file as the bundle's family reads them, with labels (B, T)."""
    import torch

    # Of a masked model every token is asked for (a share of 1): what was hidden is in the labels.
    batch = collate(rows, np.random.default_rng(0), share=1.0, dtype=bundle.model.dtype)
    if collate.family == "masked":
        batch["input_ids"] = torch.where(batch["labels"] < 0, batch["input_ids"], batch["labels"])
    return batch


def batch_sums(bundle: LanguageModel, batch: dict[str, Tensor]) -> RowSums:
    """Losses and entropies of a batch, by the bundle's family."""
    from goldcrest.kernels.metrics import perplexity

    if bundle.facts["family"] in ("seq2seq", "speech"):
        return perplexity.seq2seq_sums(bundle.model, batch)
    if bundle.facts["family"] == "masked":
        return perplexity.masked_sums(bundle.model, batch, bundle.tokenizer.mask_token_id)
    return perplexity.causal_sums(bundle.model, batch)


@dataclass(frozen=True)
class AnswerShard:
    """Prompts that one worker has one bundle answer."""

    folder: Path
    prompts: tuple[str, ...]
    settings: GenerationSettings
    batch_size: int
    device: str
    bos: bool  # whether prompts begin as the token rows do


def answers(shard: AnswerShard) -> list[str | None]:
    """The text that the bundle writes after every prompt; None: it can't read the prompt."""
    from goldcrest.tasks.language.generation import Generator

    bundle = load_on(shard.folder, shard.device)
    bundle = replace(bundle, facts={**bundle.facts, "bos": shard.bos})
    generator = Generator(bundle, batch_size=shard.batch_size)
    read = [_readable(generator, prompt) for prompt in shard.prompts]
    made = iter(generator.generate([ids for ids in read if ids is not None], shard.settings))
    return [None if ids is None else next(made).text for ids in read]


def _readable(generator: Generator, prompt: str) -> list[int] | None:
    """A prompt's tokens; None if there are none, or more than fit the model's context."""
    try:
        return generator.encode(prompt)
    except InputError:
        return None


@dataclass(frozen=True)
class SpeechShard:
    """Utterances that one worker has one bundle write down: rows of a token file."""

    folder: Path
    tokens: Path
    rows: np.ndarray  # (n,) places in the token file
    settings: GenerationSettings
    batch_size: int
    device: str


def transcripts(shard: SpeechShard) -> list[str]:
    """What the bundle hears in every utterance."""
    from goldcrest.tasks.data.speech_rows import SpeechReader
    from goldcrest.tasks.language.transcription import Transcriber

    transcriber = Transcriber(load_on(shard.folder, shard.device), batch_size=shard.batch_size)
    reader = SpeechReader(shard.tokens)
    found: list[str] = []
    for start in range(0, len(shard.rows), shard.batch_size):
        places = shard.rows[start : start + shard.batch_size]
        heard = [reader[int(place)].features for place in places]
        found += [each.text for each in transcriber.transcribe(heard, shard.settings)]
    return found


def prompt_of(example: Example) -> str:
    """What a model is given: the prompt, or the first words of a text without one."""
    if example.prompt:
        return example.prompt
    first = " ".join(example.answer.split()[:CONTINUED_WORDS])
    return first.encode()[:CONTINUED_BYTES].decode(errors="ignore")  # not half a character

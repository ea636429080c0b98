"""What a bundle makes of examples: the loss of every row, an answer to every prompt.

These functions run in workers, one shard at a time; each loads the bundle anew. What they give is
summed up in evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

CONTINUED_WORDS = 12
"""Words of a text without a prompt that a model is given to go on from."""
LOWER_IS_BETTER = {"perplexity", "bits_per_char", "bits_per_byte", "ter", "wer", "cer"}
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
        "rouge1": rouge.rouge1,
        "rouge2": rouge.rouge2,
        "rougeL": rouge.rouge_l,
        "wer": transcription.word_error_rate,
        "cer": transcription.character_error_rate,
    }
    return known[name]


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
    from goldcrest.tasks.data.tokens import TokenReader
    from goldcrest.tasks.language.bundle import load_bundle

    bundle = load_bundle(shard.folder)
    bundle.model.to(shard.device)
    reader = TokenReader(shard.tokens)
    found = np.zeros((len(shard.rows), 5))
    # Rows of similar length share a batch: less padding.
    order = np.argsort([-reader.lengths[row] for row in shard.rows], kind="stable")
    for start in range(0, len(order), shard.batch_rows):
        places = order[start : start + shard.batch_rows]
        rows = [reader[int(shard.rows[place])] for place in places]
        batch = loss_batch(bundle, rows)
        sums = batch_sums(bundle, {key: value.to(shard.device) for key, value in batch.items()})
        found[places, :3] = np.stack([each.cpu().numpy() for each in sums], axis=1)
        found[places, 3:] = text_sizes(bundle.tokenizer, batch["labels"])
    return found


def loss_batch(bundle: LanguageModel, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Rows of a token file as the bundle's family reads them, with labels (B, T)."""
    from goldcrest.tasks.language.batches import causal_batch, seq2seq_batch

    pad = bundle.tokenizer.pad_token_id or 0
    family = bundle.facts["family"]
    if family == "seq2seq":
        return seq2seq_batch(rows, pad)
    if family in ("causal", "masked"):
        # A masked model reads the same rows; every token with a label is masked in its turn.
        return causal_batch(rows, pad)
    raise InputError(f"a model of family '{family}' can't be scored on text alone")


def batch_sums(bundle: LanguageModel, batch: dict[str, Tensor]) -> RowSums:
    """Losses and entropies of a batch, by the bundle's family."""
    from goldcrest.kernels.metrics import perplexity

    if bundle.facts["family"] == "seq2seq":
        return perplexity.seq2seq_sums(bundle.model, batch)
    if bundle.facts["family"] == "masked":
        return perplexity.masked_sums(bundle.model, batch, bundle.tokenizer.mask_token_id)
    return perplexity.causal_sums(bundle.model, batch)


def text_sizes(tokenizer: Any, labels: Tensor) -> np.ndarray:
    """(B, 2) characters and UTF-8 bytes of the text behind labels (B, T)."""
    kept = [[token for token in row if token >= 0] for row in labels.tolist()]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return np.array([(len(text), len(text.encode())) for text in texts], np.float64)


@dataclass(frozen=True)
class AnswerShard:
    """Prompts that one worker has one bundle answer."""

    folder: Path
    prompts: tuple[str, ...]
    settings: GenerationSettings
    batch_size: int
    device: str


def answers(shard: AnswerShard) -> list[str]:
    """The text that the bundle writes after every prompt."""
    from goldcrest.tasks.language.bundle import load_bundle
    from goldcrest.tasks.language.generation import Generator

    bundle = load_bundle(shard.folder)
    bundle.model.to(shard.device)
    generator = Generator(bundle, batch_size=shard.batch_size)
    return [each.text for each in generator.generate(shard.prompts, shard.settings)]


def prompt_of(example: Example) -> str:
    """What a model is given: the prompt, or the first words of a text without one."""
    return example.prompt or " ".join(example.answer.split()[:CONTINUED_WORDS])

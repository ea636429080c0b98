"""Tokens: a corpus as rows of tokens that a model sees at once, ready to be batched.

A prompt and its answer are a row; plain text is packed (tasks/language/packing.py). Of prompts and
answers the loss sees the answers only. What does not fit into `length` is cut or left out, and
counted; where that is more than `max_dropped_share` the step fails and says which length would do.

    causal    [bos] prompt | answer [eos]         packed: [bos] text [eos] [bos] text [eos] ...
    seq2seq   prompt [eos] -> answer [eos]        encoder's input -> labels
    masked    packed, as above; no token twice
    speech    audio -> [prefix] text [eos]        tasks/language/speech_tokens.py

Artifact:
    train.arrow, validation.arrow, test.arrow     see tasks/data/tokens.py
    train.features.arrow, ...                     speech: see tasks/data/speech_rows.py
    facts                                         family, length, bos; per split: rows, tokens,
                                                  characters, bytes, what was dropped, and the
                                                  length that 95 % of the examples have room in
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    InputError,
    Output,
    task,
)
from goldcrest.tasks.data.tokens import TokenReader, TokenRow, TokenWriter
from goldcrest.tasks.language.examples import SPLITS, Split, count_examples, read_examples
from goldcrest.tasks.language.packing import EncodedText, Packer
from goldcrest.tasks.language.tokenizer import encode_plain, load_tokenizer, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_BYTES = 2 << 20  # of text, handed to one worker at a time
_BATCH_ROWS = 2048


class SpeechFeaturesConfig(Config):
    """What a speech model hears."""

    mel_bins: int = Field(
        80,
        ge=1,
        description="mel bins of a frame: the model's num_mel_bins (large-v3 Whisper: 128)",
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="precision of features on disk; they lie between -1.5 and about 2"
    )


class TokensConfig(Config):
    """How examples become rows of tokens."""

    family: Literal["causal", "seq2seq", "masked", "speech"] = Field(
        "causal", description="kind of model that the rows are for"
    )
    length: int = Field(
        256,
        ge=2,
        description="greatest length of a row; seq2seq: of the encoder's input; speech: of the "
        "labels (tokens)",
    )
    answer_length: int | None = Field(
        None, ge=2, description="seq2seq: greatest length of the labels (tokens); None: `length`"
    )
    pack: Literal["plain_text", "everything", "nothing"] = Field(
        "plain_text",
        description="what shares rows: text without a prompt, or prompts with their answers too, "
        "as text to learn a language from (masked models: always everything; seq2seq: never), or "
        "nothing, for models that can't keep documents apart (a long text still fills many rows)",
    )
    overlong: Literal["drop", "truncate"] = Field(
        "drop",
        description="what happens to a prompt and answer that are too long: left out, or the end "
        "of the answer (seq2seq: of either) is cut off",
    )
    max_dropped_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a split's examples that may be left out for their length; with more "
        "the step fails: what is left would not stand for the task",
    )
    bos: bool = Field(
        True, description="begin texts with the tokenizer's bos, if it has one (not seq2seq)"
    )
    speech: SpeechFeaturesConfig = Field(
        SpeechFeaturesConfig(), description="speech: features of the audio"
    )
    workers_cpus: Annotated[float, DoesNotChangeResult] = Field(
        1.0, gt=0, description="CPU cores of each worker that encodes"
    )


@task(cpus=0, seeded=False, timeout="12h", version=3)
def tokens(cfg: TokensConfig, corpus: Artifact, tokenizer: Artifact, out: Output) -> None:
    """Encode, pack and write every split (see the module docstring)."""
    folder = str(tokenizer_folder(tokenizer))
    write = _write_speech if cfg.family == "speech" else _write_text
    facts = write(cfg, corpus, folder, out)
    _check_dropped(facts, cfg, out)
    out.json(
        "facts",
        {"family": cfg.family, "length": cfg.length, "bos": cfg.bos, "splits": facts},
    )
    out.metrics(tokens=facts)
    out.figure("lengths", _length_figure(out.path, cfg))


def _write_speech(cfg: TokensConfig, corpus: Artifact, folder: str, out: Output) -> dict[str, Any]:
    from goldcrest.tasks.language.speech_tokens import write_speech

    return write_speech(cfg, corpus, folder, out)


def _write_text(cfg: TokensConfig, corpus: Artifact, folder: str, out: Output) -> dict[str, Any]:
    """Encode, pack and write every split of a corpus of texts."""
    encode = functools.partial(encode_batch, folder=folder, bos=cfg.bos, family=cfg.family)
    total = sum(count_examples(corpus, split) for split in SPLITS)
    facts: dict[str, dict[str, int]] = {}
    done = 0
    for split in SPLITS:
        with TokenWriter(out.file(f"{split}.arrow")) as writer:
            rows = _RowMaker(cfg, writer)
            texts = _text_batches(corpus, split)
            for batch in out.runtime.map(encode, texts, cpus=cfg.workers_cpus, note="encode"):
                for prompt, answer in batch:
                    rows.add(prompt, answer)
                done += len(batch)
                out.progress(done / max(total, 1), f"{done} examples")
            rows.close()
        facts[split] = rows.facts
    return facts


def _text_batches(corpus: Artifact, split: Split) -> Iterator[list[tuple[str, str]]]:
    """Prompts and answers in batches of bounded size."""
    batch: list[tuple[str, str]] = []
    size = 0
    for example in read_examples(corpus, split):
        batch.append((example.prompt, example.answer))
        size += len(example.prompt) + len(example.answer)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=2)
def loaded_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, read once in a process."""
    return load_tokenizer(Path(folder))


def encode_batch(
    texts: Sequence[tuple[str, str]], *, folder: str, bos: bool, family: str
) -> list[tuple[EncodedText, EncodedText]]:
    """Prompts and answers as tokens, with bos and eos where the family has them; on a worker."""
    tokenizer = loaded_tokenizer(folder)
    begin = [] if tokenizer.bos_token_id is None or not bos else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id]
    prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    if family == "seq2seq":
        encoded = encoded_texts(tokenizer, prompts, [], end)
    else:
        encoded = encoded_texts(tokenizer, prompts, begin, [])
    return list(zip(encoded, encoded_texts(tokenizer, answers, [], end), strict=True))


def encoded_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], begin: list[int], end: list[int]
) -> list[EncodedText]:
    """Texts as tokens, between those that begin and end each.

    The last token's ends are those of the text, whatever a normaliser did.
    """
    encoded = []
    for text, found in zip(texts, encode_plain(tokenizer, texts), strict=True):
        ends = np.zeros(len(begin) + len(found) + len(end), np.int64)
        if len(found):
            inside = np.array(found.offsets, np.int64)[:, 1]
            ends[len(begin) : len(begin) + len(inside)] = np.maximum.accumulate(inside)
            ends[len(begin) + len(inside) - 1 :] = len(text)
        ids = np.array([*begin, *found.ids, *end], np.int32)
        encoded.append(EncodedText(ids, ends, ends if text.isascii() else _sizes(text)[ends]))
    return encoded


def _sizes(text: str) -> np.ndarray:
    """UTF-8 bytes of the first 0, 1, 2, ... characters of a text, (N + 1,) int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@dataclass
class _RowMaker:
    """Turns encoded examples of one split into rows, writes and counts them."""

    cfg: TokensConfig
    writer: TokenWriter
    facts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                *("examples", "rows", "tokens", "predicted", "characters", "bytes"),
                *("dropped", "truncated", "longest", "length_95"),
            ),
            0,
        )
    )

    def __post_init__(self) -> None:
        self._packer = Packer(
            self.cfg.length,
            causal=self.cfg.family != "masked",
            alone=self.cfg.pack == "nothing",
        )
        self._lengths: Counter[int] = Counter()

    def add(self, prompt: EncodedText, answer: EncodedText) -> None:
        """The next example."""
        number = self.facts["examples"]
        self.facts["examples"] += 1
        plain = not prompt.characters.any()
        if self.cfg.family == "seq2seq" and plain:
            raise InputError(
                "plain text can't train an encoder-decoder: it has no prompts",
                hint="give templates for prompt and answer, or choose the causal family",
            )
        everything = self.cfg.pack == "everything" and self.cfg.family != "seq2seq"
        if plain or everything or self.cfg.family == "masked":
            for packed in self._packer.add(prompt.then(answer), number):
                self._write(packed.row, packed.example, packed.characters, packed.bytes)
        else:
            self._add_example(prompt, answer, number)

    def close(self) -> None:
        """The last, shorter row."""
        for packed in self._packer.close():
            self._write(packed.row, packed.example, packed.characters, packed.bytes)
        self.facts["length_95"] = room_for(self._lengths)

    def _add_example(self, prompt: EncodedText, answer: EncodedText, number: int) -> None:
        cfg = self.cfg
        limits = (cfg.length, cfg.answer_length or cfg.length)
        if cfg.family == "causal":
            limits = (cfg.length - 1, max(cfg.length - len(prompt), 1))
            self._lengths[len(prompt) + len(answer)] += 1
        else:
            self._lengths[max(len(prompt), len(answer))] += 1
        fits = len(prompt) <= limits[0] and len(answer) <= limits[1]
        cut = cfg.overlong == "truncate" and (cfg.family == "seq2seq" or len(prompt) <= limits[0])
        if not fits and not cut:
            self.facts["dropped"] += 1
            return
        self.facts["truncated"] += not fits
        kept = min(len(answer), limits[1])
        question = prompt.tokens
        if len(question) > limits[0]:  # an encoder's input still ends in eos
            question = np.append(question[: limits[0] - 1], question[-1:])
        row = TokenRow(question, answer.tokens[:kept])
        self._write(row, number, int(answer.characters[kept - 1]), int(answer.bytes[kept - 1]))

    def _write(self, row: TokenRow, example: int, characters: int, size: int) -> None:
        self.writer.write(row, example=example, characters=characters, size=size)
        facts = self.facts
        facts["rows"] += 1
        facts["tokens"] += len(row)
        # Of a document's tokens in a packed row the first has nothing to be predicted from, but for
        # a masked model, which looks in both directions.
        first = 0 if self.cfg.family == "masked" else len(row.starts)
        facts["predicted"] += len(row.answer) - first
        facts["characters"] += characters
        facts["bytes"] += size
        facts["longest"] = max(facts["longest"], len(row))


def room_for(lengths: Mapping[int, int], share: float = 0.95) -> int:
    """The least length that `share` of the examples have room in; 0 of none.

    `lengths` says how many examples have each length.
    """
    wanted, seen = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


def _check_dropped(splits: Mapping[str, Mapping[str, int]], cfg: TokensConfig, out: Output) -> None:
    """Say what was left out of each split; InputError where too little of one is left."""
    fields = "tokens.length" + (" and tokens.answer_length" if cfg.answer_length else "")
    said = []
    for split, facts in splits.items():
        dropped, examples = facts["dropped"], facts["examples"]
        if dropped > cfg.max_dropped_share * examples or (split == "train" and not facts["rows"]):
            raise InputError(
                f"{dropped} of {examples} examples of the split '{split}' do not fit into "
                f"{cfg.length} tokens: what is left would not stand for the task",
                hint=f"set {fields} to {facts['length_95']}, which has room for 95 % of them (the "
                "model needs as many positions), or tokens.overlong to truncate",
            )
        if dropped:
            said.append(f"{dropped} of {examples} ({split})")
    if said:
        out.progress(None, f"left out, longer than {cfg.length} tokens: {', '.join(said)}")


def _length_figure(folder: Path, cfg: TokensConfig) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    lengths = [TokenReader(folder / f"{split}.arrow").lengths for split in SPLITS]
    axes.hist(lengths, bins=30, stacked=True, label=SPLITS)
    axes.set(xlabel="tokens in a row", ylabel="rows", title=f"at most {cfg.length}")
    axes.legend(loc="upper left", fontsize="small")
    return figure

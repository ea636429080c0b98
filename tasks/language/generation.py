"""Text from a language model: greedy, beam search, sampling; whole, or piece by piece.

transformers' `generate` runs the model. Around it stand the things that a service needs:

- prompts of different length share a batch: padded on the left where the model continues them;
- a prompt that does not fit the context is refused before the model runs;
- stop strings are searched in the text, as they need not begin or end where tokens do;
- a stream holds back what may yet become part of a stop string or of a character (`transcript.py`),
  so that its pieces are exactly the text that `generate` returns;
- sampling draws from generators of its own, one per prompt, seeded by the request: the same seed
  gives the same text beside any other requests (`sampling.py`).

The model is only read: requests in several threads may share one `Generator`.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from goldcrest.cluster.api import Config, InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig

    from goldcrest.tasks.language.bundle import LanguageModel

Prompt = str | Sequence[int]
"""A text, or its tokens, special ones included (those of a chat template, say)."""
FinishReason = Literal["stop", "length", "cancelled"]
"""The end-of-text token or a stop string came; no room was left; somebody called it off."""

WRITERS = ("causal", "seq2seq")
"""Families of models that write text after a prompt."""
_OF_THE_MODEL = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""What a model's folder says of the tokens it can write; the rest of it is taste."""
_ENCODER = ("max_encoder_position_embeddings", "max_position_embeddings")
_DECODER = ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings")
"""Fields by which configs of encoder-decoders name their positions, the narrower ones first."""


class GenerationSettings(Config):
    """How text is chosen: greedily, by beam search (`beams`) or sampled (`temperature`)."""

    max_new_tokens: int = Field(128, ge=1, description="tokens at most; the context may end sooner")
    beams: int = Field(1, ge=1, description="hypotheses that beam search keeps; 1: no beam search")
    length_penalty: float = Field(
        1.0, description="beam search divides log probabilities by the length to this power"
    )
    temperature: float = Field(
        0.0, ge=0, description="logits are divided by it before sampling; 0: the likeliest token"
    )
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens")
    top_p: float = Field(
        1.0,
        ge=0,
        le=1,
        description="sample among the fewest tokens with this probability together, one at least",
    )
    seed: int = Field(0, ge=0, description="seed of the sampling")
    stop: tuple[str, ...] = Field((), description="texts that end the answer and are cut off")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample: leave beams at 1 or temperature at 0")
        if "" in self.stop:
            raise ValueError("a stop string is empty: every text would end at once")
        return self


@dataclass(frozen=True)
class Generation:
    """One answer. `tokens` are those that the model chose, without the end-of-text token."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """A part of a stream: text that is now certain (perhaps none yet) and the token behind it.

    The last piece has no token but the reason of the end and what text was still held back.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None


def without_taste(known: GenerationConfig) -> GenerationConfig:
    """The settings without penalties, sampling and lengths that a model's maker liked.

    transformers fills in from them whatever a request leaves open, so they would leak into plain
    greedy decoding, and into what models are compared by.
    """
    from transformers import GenerationConfig

    kept = {name: getattr(known, name, None) for name in _OF_THE_MODEL}
    return GenerationConfig(
        **{name: value for name, value in kept.items() if value not in (None, [])}
    )


def _limits(config: PreTrainedConfig, family: str) -> tuple[int | None, int | None]:
    """Tokens that a prompt (of a causal model: with its answer) and an answer may have.

    None: any number. T5 has relative positions, and no limit, though its configs may name
    `n_positions`: of an encoder-decoder that field means nothing.
    """
    from goldcrest.kernels.language.architectures import longest_text

    def first(names: Sequence[str]) -> int | None:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    if family == "seq2seq":
        return first(_ENCODER), first(_DECODER)
    return (longest_text(config) if family == "causal" else None), None


def _count_from(model: Any, first: int) -> None:
    """Have `generate` give the model positions from `first` on; the library counts from 0."""
    prepare = model.prepare_inputs_for_generation
    if first == getattr(prepare, "first", 0):
        return

    @functools.wraps(prepare)  # the library looks at its parameters
    def prepared(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        if made.get("position_ids") is not None:
            made["position_ids"] = made["position_ids"] + first
        return made

    prepared.first = first  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = prepared


class Generator:
    """Text from one loaded bundle.

    `context`: tokens that a prompt may have, of a causal model together with its answer;
    `longest_answer`: those of an encoder-decoder's answer. None: any number.
    """

    families: tuple[str, ...] = WRITERS

    def __init__(self, model: LanguageModel, *, batch_size: int = 16) -> None:
        """`batch_size` prompts run through the model together at most.

        The model's `generation_config` keeps its special tokens only (`without_taste`). Raises
        InputError for a model that can't continue a text: an encoder, a speech model.
        """
        from goldcrest.kernels.language.architectures import first_position
        from goldcrest.tasks.language.collator import decoder_begin

        self.family: str = model.facts["family"]
        if self.family not in self.families:
            raise InputError(
                f"a model of family '{self.family}' does not write text after a prompt",
                hint=f"{type(self).__name__} takes models of {' and '.join(self.families)}",
            )
        self.bundle, self.tokenizer = model, model.tokenizer
        self.model: Any = model.model  # `generate` is mixed in by the library, untyped
        self.model.generation_config = without_taste(self.model.generation_config)
        self.batch_size = batch_size
        self.context, self.longest_answer = _limits(self.model.config, self.family)
        self._decoder_begin: int | None = None
        if self.family == "causal":
            _count_from(self.model, first_position(self.model.config))
        else:
            self._decoder_begin = decoder_begin(self.model.config)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        cancelled: threading.Event | None = None,
    ) -> list[Generation]:
        """An answer to every prompt, in order. InputError for a prompt that does not fit.

        Setting `cancelled` stops the model before its next token; what there is is returned.
        """
        ended = None if cancelled is None else cancelled.is_set
        encoded = [self.encode(prompt) for prompt in prompts]
        found: dict[int, Generation] = {}
        for places, room in self._batches([len(ids) for ids in encoded], settings.max_new_tokens):
            batch = [encoded[i] for i in places]
            chosen = self._run(batch, places, room, settings, ended=ended)
            for place, tokens in zip(places, chosen, strict=True):
                found[place] = self._answer(tokens, settings, len(encoded[place]))
        return [found[place] for place in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        cancelled: threading.Event | None = None,
    ) -> Iterator[Piece]:
        """The answer to a prompt while it is made; its pieces' texts joined are `generate`'s.

        Setting `cancelled`, or closing the iterator, stops the model before its next token.
        InputError is raised here, before the first piece is asked for.
        """
        if settings.beams > 1:
            raise InputError(
                "beam search can't be streamed: it may change what it has written",
                hint="leave beams at 1, or ask for the whole answer",
            )
        return self._pieces(self.encode(prompt), settings, cancelled or threading.Event())

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens; InputError if it is empty or leaves no room in the context."""
        from goldcrest.tasks.language.prompts import encode_prompt

        ids = encode_prompt(self.bundle, prompt) if isinstance(prompt, str) else list(prompt)
        strange = [token for token in ids if not 0 <= token < len(self.tokenizer)]
        if strange:
            raise InputError(
                f"the prompt holds the token {strange[0]}; the vocabulary ends at "
                f"{len(self.tokenizer) - 1}"
            )
        if not ids:
            raise InputError(
                "the prompt is empty and the tokenizer has no token that begins a text",
                hint="write at least one character",
            )
        if self.context is None:
            return ids
        if self.family == "seq2seq" and len(ids) > self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the model's encoder reads {self.context}",
                hint="shorten the prompt",
            )
        if self.family == "causal" and len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the "
                f"model's context of {self.context}",
                hint="shorten the prompt",
            )
        return ids

    def step_seconds(self, prompt: Any, new_tokens: int) -> list[float]:
        """Seconds that each of `new_tokens` tokens takes after a prompt, the first with prefill.

        Greedy, one prompt; the end-of-text token is never chosen, so that all models do the same.
        """
        import torch

        settings = GenerationSettings(max_new_tokens=new_tokens)
        times = [time.perf_counter()]

        def tick() -> bool:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return False

        self._run([prompt], [0], new_tokens, settings, ended=tick, least=new_tokens)
        return [after - before for before, after in itertools.pairwise(times)]

    def _batches(self, lengths: Sequence[int], wanted: int) -> Iterator[tuple[list[int], int]]:
        """Places of prompts that run together, and how many tokens each of them may write.

        Prompts of a batch have the same room: one that is near the end of its context must not
        cut the others short, nor be carried beyond it by them.
        """
        rooms = [self._room(length, wanted) for length in lengths]
        batch: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda i: (rooms[i], lengths[i], i)):
            if batch and (len(batch) == self.batch_size or rooms[place] != rooms[batch[0]]):
                yield batch, rooms[batch[0]]
                batch = []
            batch.append(place)
        if batch:
            yield batch, rooms[batch[0]]

    def _room(self, length: int, wanted: int) -> int:
        """Tokens that a prompt of so many may be answered by: a decoder has a context of its own,
        in which a start token stands and the last token needs no place."""
        if self.family == "seq2seq":
            return wanted if self.longest_answer is None else min(wanted, self.longest_answer)
        return wanted if self.context is None else min(wanted, self.context - length)

    def _run(
        self,
        prompts: Sequence[Any],
        streams: Sequence[int],
        room: int,
        settings: GenerationSettings,
        *,
        ended: Callable[[], bool] | None = None,
        on_token: Callable[[int], None] | None = None,
        least: int = 0,
    ) -> list[list[int]]:
        """Run the model; new tokens of every prompt up to its end of text.

        `streams` number the prompts' random draws; `ended` is asked after every token; `on_token`
        hears each token of a single prompt; no text ends before `least` tokens.
        """
        from goldcrest.tasks.language import sampling, stopping

        inputs = self._inputs(prompts)
        start = self._start(inputs)
        criteria = stopping.criteria(self.tokenizer, settings.stop, start, ended)
        output = self._generate(
            **inputs,
            generation_config=self._config(room, settings, least),
            logits_processor=sampling.processors(settings, streams),
            stopping_criteria=criteria,
            streamer=None if on_token is None else stopping.Listener(on_token),
        )
        return [self._until_end(row) for row in output[:, start:].tolist()]

    def _start(self, inputs: dict[str, Tensor]) -> int:
        """Place of the first new token in what the model gives back."""
        return inputs["input_ids"].shape[1] if self.family == "causal" else 1

    def _generate(self, **arguments: Any) -> Tensor:
        """Tokens (B, T) of transformers' `generate`."""
        made: Tensor = self.model.generate(**arguments)
        return made

    def _inputs(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Prompts as a batch: input_ids and attention_mask (B, P) int64."""
        import torch

        width = max(len(ids) for ids in prompts)
        pad = self._pad()
        rows, masks = [], []
        for ids in prompts:
            space = width - len(ids)
            # A causal model goes on at the right edge, so padding has to stand on the left.
            before, after = (space, 0) if self.family == "causal" else (0, space)
            rows.append([pad] * before + list(ids) + [pad] * after)
            masks.append([0] * before + [1] * len(ids) + [0] * after)
        device = self.model.device
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(masks, device=device),
        }

    def _config(self, room: int, settings: GenerationSettings, least: int) -> Any:
        """transformers' own settings; open ones are filled in from the model's special tokens."""
        from transformers import GenerationConfig

        known = self.model.generation_config
        return GenerationConfig(
            max_new_tokens=room,
            min_new_tokens=least or None,
            do_sample=False,
            num_beams=settings.beams,
            length_penalty=settings.length_penalty,
            bos_token_id=known.bos_token_id,
            eos_token_id=self._ends() or None,
            pad_token_id=self._pad(),
            decoder_start_token_id=self._decoder_begin,
        )

    def _ends(self) -> list[int]:
        """Tokens that end a text: nothing sensible comes after padding either."""
        known = self.model.generation_config.eos_token_id
        found = known if isinstance(known, list) else [known, self.tokenizer.eos_token_id]
        return sorted({each for each in (*found, self.tokenizer.pad_token_id) if each is not None})

    def _pad(self) -> int:
        """A token to fill up with; masked, so any will do where none is named."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self._ends() or [0])[0]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to and with the first one that ends the text."""
        ends = set(self._ends())
        for place, token in enumerate(tokens):
            if token in ends:
                return tokens[: place + 1]
        return tokens

    def _answer(
        self, tokens: Sequence[int], settings: GenerationSettings, prompt_tokens: int
    ) -> Generation:
        from goldcrest.tasks.language.transcript import Transcript

        transcript = Transcript(self.tokenizer, settings.stop, self._ends())
        text = "".join(transcript.add(token) for token in tokens) + transcript.finish()
        reason: FinishReason = "stop" if transcript.ended else "length"
        return Generation(text, tuple(transcript.tokens), reason, prompt_tokens)

    def _pieces(
        self, ids: list[int], settings: GenerationSettings, cancelled: threading.Event
    ) -> Iterator[Piece]:
        from goldcrest.tasks.language.transcript import Transcript

        ((_, room),) = self._batches([len(ids)], settings.max_new_tokens)
        left = threading.Event()  # nobody reads any more
        made: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._run(
                    [ids],
                    [0],
                    room,
                    settings,
                    ended=lambda: left.is_set() or cancelled.is_set(),
                    on_token=made.put,
                )
            except BaseException as error:  # noqa: BLE001 - raised again where the pieces are read
                failure.append(error)
            finally:
                made.put(None)

        transcript = Transcript(self.tokenizer, settings.stop, self._ends())
        worker = threading.Thread(target=work, name="generate", daemon=True)
        given = 0
        worker.start()
        try:
            while not transcript.ended and (token := made.get()) is not None:
                text, known = transcript.add(token), len(transcript.tokens)
                if known > given:
                    yield Piece(text, token)
                given = known
        finally:
            left.set()
            worker.join()
        if failure:
            raise failure[0]
        rest = transcript.finish()  # a stop string may stand in what was held back
        reason: FinishReason = "stop" if transcript.ended else "length"
        if reason == "length" and cancelled.is_set() and len(transcript.tokens) < room:
            reason = "cancelled"
        yield Piece(rest, None, reason)

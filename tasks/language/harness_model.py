"""A language bundle as EleutherAI's lm-evaluation-harness sees a model.

Source: L. Gao et al., "A framework for few-shot language model evaluation", Zenodo 2021;
`lm_eval.api.model.TemplateLM` (lm-eval 0.4). Prompts carry the special tokens that the bundle was
trained with; whatever low precision the bundle computes in is what is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from goldcrest.cluster.api import InputError
from goldcrest.kernels.language.architectures import decoder_start, longest_text
from goldcrest.kernels.language.losses import decoder_inputs
from goldcrest.tasks.language.bundle import LanguageModel
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.prompts import encode_prompt
from goldcrest.tasks.language.tokenizer import encode_plain

DEFAULT_CONTEXT = 2048
"""Tokens that are read at once by a model that has no limit of its own."""
DEFAULT_NEW_TOKENS = 256

_Request = tuple[tuple[str, str], list[int], list[int]]


class BundleModel(TemplateLM):
    """Log-likelihoods and answers of one loaded bundle."""

    def __init__(
        self, bundle: LanguageModel, *, batch_size: int = 8, seed: int = 0, chat: bool = False
    ) -> None:
        """`chat`: texts are what the tokenizer's chat template wrote, special tokens included.

        InputError for a bundle that does not write text: its answers can't be scored; and for
        `chat` where the tokenizer has no template.
        """
        super().__init__()
        if chat and getattr(bundle.tokenizer, "chat_template", None) is None:
            raise InputError(
                f"the tokenizer of the bundle '{bundle.facts['name']}' has no chat template",
                hint="set chat to false",
            )
        self._chat = chat
        self._generator = Generator(bundle, batch_size=batch_size)
        self._bundle, self._batch_size, self._seed = bundle, batch_size, seed
        self.tokenizer = bundle.tokenizer
        self.backend = bundle.facts["family"]
        self.max_length = longest_text(bundle.model.config) or DEFAULT_CONTEXT

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise InputError("the bundle's tokenizer has no token that ends a text")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text is preceded by where nothing else is."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own caches of requests."""
        return f"{self._bundle.facts['architecture']}-{self._bundle.facts['name']}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, with the bundle's special ones unless they are not wanted.

        A chat template has written special tokens itself, the one that begins a text too.
        """
        if self._chat:
            return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        if add_special_tokens is False:
            return list(encode_plain(self.tokenizer, [string])[0].ids)
        return encode_prompt(self._bundle, string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A dialogue as the text that the bundle's tokenizer makes of it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, longer ones in windows that predict every token once."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scored = self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
            found.append(sum(value for value, _ in scored))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string; prompts that are too long lose their beginning."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in groups.values():
            settings = self._settings(requests[places[0]].args[1])
            room = max(1, self.max_length - settings.max_new_tokens)
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            answers = self._generator.generate(prompts, settings)
            found.update({place: each.text for place, each in zip(places, answers, strict=True)})
        return [found[place] for place in range(len(requests))]

    def _settings(self, given: dict[str, Any]) -> GenerationSettings:
        """A task's generation arguments; InputError for one that would be ignored."""
        values = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        stop = handle_stop_sequences(values.pop("until", None), eos=None)
        sampled = bool(values.pop("do_sample", False))
        settings = {
            "max_new_tokens": min(int(values.pop("max_gen_toks")), self.max_length - 1),
            "temperature": float(values.pop("temperature", 1.0) or 0.0) if sampled else 0.0,
            "beams": int(values.pop("num_beams", 1)),
            "top_k": values.pop("top_k", None),
            "top_p": float(values.pop("top_p", 1.0)),
            "seed": self._seed,
            "stop": tuple(each for each in stop if each),
        }
        if values:
            raise InputError(f"the task asks for unknown generation settings: {', '.join(values)}")
        return GenerationSettings.model_validate(settings)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether greedy decoding would write it."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            pairs = [requests[place][1:] for place in places]
            rows = self._seq2seq_rows(pairs) if self.backend == "seq2seq" else self._rows(pairs)
            for place, (scores, wanted) in zip(places, rows, strict=True):
                logs = scores.float().log_softmax(dim=-1)
                chosen = torch.tensor(wanted, device=logs.device)
                value = logs.gather(1, chosen[:, None]).sum()
                found[place] = (float(value), bool((logs.argmax(dim=-1) == chosen).all()))
        return [found[place] for place in range(len(requests))]

    @torch.no_grad()
    def _rows(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[Tensor, list[int]]]:
        """Logits (n, V) of a causal model for each pair's continuation of n tokens."""
        inputs = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens; the model's context is "
                    f"{self.max_length}"
                )
            inputs.append((context + continuation)[-self.max_length - 1 : -1])
        logits = self._bundle.model(**self._padded(inputs), use_cache=False).logits
        return [
            (row[len(ids) - len(continuation) : len(ids)], continuation)
            for row, ids, (_, continuation) in zip(logits, inputs, pairs, strict=True)
        ]

    @torch.no_grad()
    def _seq2seq_rows(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[Tensor, list[int]]]:
        """The same of an encoder-decoder: the context is read, the continuation written."""
        inputs = self._padded([context[-self.max_length :] for context, _ in pairs])
        labels = self._padded([continuation for _, continuation in pairs])
        fed = decoder_inputs(
            labels["input_ids"],
            start=decoder_start(self._bundle.model.config),
            pad=self.tokenizer.pad_token_id or 0,
        )
        logits = self._bundle.model(**inputs, decoder_input_ids=fed, use_cache=False).logits
        return [
            (row[: len(continuation)], continuation)
            for row, (_, continuation) in zip(logits, pairs, strict=True)
        ]

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Rows as a batch, padded on the right: input_ids and attention_mask (B, T)."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        device = self._bundle.model.device
        ids = [row + [pad] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

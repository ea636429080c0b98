"""Text from a speech model: what was said, greedily or by beam search.

The library's `generate` for Whisper cuts long recordings, looks for time stamps and falls back to
sampling; here an utterance fits the model's window (what is longer is refused), so the decoder runs
as any other: the start token and the prefix (tokenizer.py), then token by token to the end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goldcrest.cluster.api import InputError
from goldcrest.tasks.language.generation import Generation, GenerationSettings, Generator

if TYPE_CHECKING:
    from torch import Tensor

    from goldcrest.tasks.language.bundle import LanguageModel


class Transcriber(Generator):
    """Transcripts by one loaded bundle of a speech model."""

    families = ("speech",)

    def __init__(self, model: LanguageModel, *, batch_size: int = 16) -> None:
        """`batch_size` utterances run through the model together at most.

        Raises InputError for a model of another family, and for one that does not read Whisper's
        features.
        """
        from goldcrest.kernels.language.architectures import longest_text, speech_window
        from goldcrest.tasks.language.tokenizer import transcript_prefix

        super().__init__(model, batch_size=batch_size)
        config = self.model.config
        try:
            self.frames, self.mel_bins = speech_window(config)
        except ValueError as error:
            raise InputError(f"{error}: it can't transcribe here") from error
        self.context = longest_text(config)
        self.begin = [config.decoder_start_token_id, *transcript_prefix(self.tokenizer)]

    def hear(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, M) float32 of utterances (N,) float32, 16 kHz mono, in [-1, 1].

        InputError for one that is empty or does not fit the model's window.
        """
        import torch

        from goldcrest.kernels.frontend.whisper_mel import FRAME_SHIFT, SAMPLE_RATE, features

        for wave in waves:
            if not 0 < len(wave) <= self.frames * FRAME_SHIFT:
                raise InputError(
                    f"an utterance of {len(wave) / SAMPLE_RATE:g} s; the model reads up to "
                    f"{self.frames / 100:g} s at once",
                    hint="cut it where nobody speaks",
                )
        made = features([torch.from_numpy(wave) for wave in waves], self.mel_bins)
        return [each.numpy() for each in made]

    def transcribe(
        self,
        heard: Sequence[np.ndarray],
        settings: GenerationSettings,
        cancelled: threading.Event | None = None,
    ) -> list[Generation]:
        """What was said in every utterance, in order, from its features (T, M).

        Setting `cancelled` stops the model before its next token.
        """
        ended = None if cancelled is None else cancelled.is_set
        found: dict[int, Generation] = {}
        lengths = [len(self.begin)] * len(heard)
        for places, room in self._batches(lengths, settings.max_new_tokens):
            chosen = self._run([heard[i] for i in places], places, room, settings, ended=ended)
            for place, tokens in zip(places, chosen, strict=True):
                found[place] = self._answer(tokens, settings, len(self.begin))
        return [found[place] for place in range(len(heard))]

    def generate(
        self,
        prompts: Sequence[Any],
        settings: GenerationSettings,
        cancelled: threading.Event | None = None,
    ) -> list[Generation]:
        """`transcribe`: to whom a generator is given, an utterance is a prompt."""
        return self.transcribe(prompts, settings, cancelled)

    def _start(self, inputs: dict[str, Tensor]) -> int:
        return inputs["decoder_input_ids"].shape[1]

    def _generate(self, **arguments: Any) -> Tensor:
        from transformers import GenerationMixin

        plain: Any = GenerationMixin.generate
        made: Tensor = plain(self.model, **arguments)
        return made

    def _inputs(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Features as a batch: input_features (B, M, frames); decoder_input_ids (B, P) int64."""
        import torch

        from goldcrest.kernels.frontend.whisper_mel import window

        heard = [window(torch.from_numpy(each), self.frames) for each in prompts]
        device = self.model.device
        return {
            "input_features": torch.stack(heard).to(device, self.model.dtype),
            "decoder_input_ids": torch.tensor([self.begin] * len(heard), device=device),
        }

"""How a transcript begins: with tokens that are given to the decoder, not asked from it."""

from __future__ import annotations

import numpy as np
from tokenizers.processors import TemplateProcessing

from goldcrest.tasks.language.generation import GenerationSettings
from goldcrest.tasks.language.transcription import Transcriber
from tests.tasks.language.writing_models import tiny_bundle

GREEDY = GenerationSettings(max_new_tokens=8)


def test_a_trained_whispers_prefix_begins_every_transcript() -> None:
    """What stands before the text is given to the decoder, not asked from it."""
    bundle = tiny_bundle("whisper")
    backend = bundle.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=["<mask>", "$A", "</s>"], special_tokens=[("<mask>", 3), ("</s>", 2)]
    )
    transcriber = Transcriber(bundle)
    assert transcriber.begin == [1, 3]
    assert transcriber.context is not None
    heard = [np.random.default_rng(0).random((100, 80), np.float32)]
    (made,) = transcriber.transcribe(heard, GenerationSettings(max_new_tokens=500))
    assert made.prompt_tokens == 2 and len(made.tokens) <= transcriber.context - 2
    first = transcriber._run(heard, [0], 1, GREEDY)[0][0]
    bundle.model.generation_config.begin_suppress_tokens = [first]
    assert transcriber._run(heard, [0], 1, GREEDY)[0][0] != first

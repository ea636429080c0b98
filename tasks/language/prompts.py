"""A prompt as a model reads it: with the special tokens that it was trained with (tokens.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goldcrest.tasks.language.bundle import LanguageModel


def encode_prompt(bundle: LanguageModel, prompt: str) -> list[int]:
    """Tokens of a prompt.

    A causal model reads the tokenizer's bos before it, if it has one and the bundle does not say
    that it was trained without (`bos: false`); an encoder reads its eos after it. Text that spells
    a special token stays text, so a prompt can't end itself.
    """
    from goldcrest.tasks.language.tokenizer import encode_plain

    tokenizer = bundle.tokenizer
    ids: list[int] = encode_plain(tokenizer, [prompt])[0].ids
    if bundle.facts["family"] != "causal":
        return ids + [each for each in [tokenizer.eos_token_id] if each is not None]
    begins = tokenizer.bos_token_id is not None and bundle.facts.get("bos", True)
    return [tokenizer.bos_token_id, *ids] if begins else ids

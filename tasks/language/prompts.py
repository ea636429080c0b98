"""A prompt as a model reads it: the same tokens that it was trained on."""

from __future__ import annotations

from typing import Any


def encode_prompt(tokenizer: Any, prompt: str, family: str) -> list[int]:
    """Tokens of a prompt; an empty one becomes the token that begins (or ends) a text, if any.

    A causal model goes on where the prompt ends, so nothing is added to it; an encoder reads it
    with the special tokens that its tokenizer adds.
    """
    whole = family != "causal"
    ids: list[int] = tokenizer(prompt, add_special_tokens=whole)["input_ids"]
    if ids:
        return ids
    return [each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None][
        :1
    ]

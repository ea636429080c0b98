"""What every text of a corpus goes through: the config's replacements, then a check."""

from __future__ import annotations

import re

from goldcrest.tasks.data.templates import FieldError

Replacements = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs."""


def check_replacements(replacements: Replacements) -> None:
    """ValueError for a regular expression or a replacement that can't be used."""
    for pattern, by in replacements:
        try:
            re.sub(pattern, by, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"replacing '{pattern}' by '{by}': {error}") from error


def replaced(text: str, replacements: Replacements) -> str:
    """The text after all replacements, in order."""
    for pattern, by in replacements:
        text = re.sub(pattern, by, text)
    return text


def check_text(what: str, text: str, limit: int) -> None:
    """FieldError for a text that is empty, longer than `limit` bytes, or can't be written."""
    if not text.strip():
        raise FieldError(f"the {what} is empty")
    if "\0" in text:
        raise FieldError(f"the {what} holds a NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise FieldError(f"the {what} holds half a surrogate pair: not UTF-8 text") from None
    if size > limit:
        raise FieldError(f"the {what} is longer than {limit} bytes")

"""Templates over the fields of a row: `"{question}\\n"`, `"{translation.en}"`, `"{tripleset}"`.

A template makes a row of any data set into a prompt or an answer, so that a new data set is a new
config and not new code. Braces name a field, dots a field inside it, `{{` and `}}` are braces. A
list is joined, with one separator for each depth of nesting: `[["A", "is", "B"], ["A", "in", "C"]]`
with `(" | ", " : ")` is `A : is : B | A : in : C`.

Python's own `str.format` would also follow attributes of objects, which text from a file or a
config must not reach; here a path leads through mappings only.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class FieldError(ValueError):
    """A row has no such field, or a field that is no text."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a field's value that a file holds and Python can't: text that is not UTF-8, a date
    beyond the year 9999. Only a row whose template reads the field is lost by it.
    """

    reason: str


class Template:
    """A parsed template; see the module's docstring."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for braces that don't match and for Python's `!r` or `:08d` forms."""
        self.text = text
        self._parts: list[tuple[str, tuple[str, ...] | None]] = []
        for literal, name, form, conversion in string.Formatter().parse(text):
            if form or conversion:
                raise ValueError(f"'{text}': only {{field}} or {{field.inner}} can be written")
            if name is not None and not all(name.split(".")):
                raise ValueError(f"'{text}': a field has no name between its braces")
            self._parts.append((literal, None if name is None else tuple(name.split("."))))

    @property
    def fields(self) -> list[str]:
        """Names of the row's fields (their first parts) that it reads, in order."""
        return list(dict.fromkeys(path[0] for _, path in self._parts if path is not None))

    @property
    def dotted(self) -> bool:
        """Whether it reads a field inside a field."""
        return any(path is not None and len(path) > 1 for _, path in self._parts)

    def render(self, row: Mapping[str, Any], separators: Sequence[str]) -> str:
        """The text for one row; FieldError for a field that is missing or no text."""
        return "".join(
            literal + ("" if path is None else _as_text(_find(row, path), path, separators))
            for literal, path in self._parts
        )

    def render_each(self, row: Mapping[str, Any], separators: Sequence[str]) -> list[str]:
        """The texts for a row in which a list holds several answers: one text for each entry.

        Lists inside an entry are joined, from the second separator on. FieldError for two lists.
        """
        found = {path: _find(row, path) for _, path in self._parts if path is not None}
        lists = [path for path, value in found.items() if isinstance(value, list)]
        if not lists:
            return [self.render(row, separators)]
        if len(lists) > 1:
            named = " and ".join(".".join(path) for path in lists)
            raise FieldError(f"the fields {named} are both lists: of which is an entry an answer?")
        (chosen,) = lists
        return [
            "".join(
                literal
                + (
                    ""
                    if path is None
                    else _as_text(entry if path == chosen else found[path], path, separators[1:])
                )
                for literal, path in self._parts
            )
            for entry in found[chosen]
        ]


def _find(row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = row.get(".".join(path))  # a column may itself be called `translation.en`
    if value is not None:
        return value
    value = row
    for depth, name in enumerate(path):
        _check_readable(value, path[:depth])
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise FieldError(f"there is no field '{'.'.join(path[: depth + 1])}'")
        value = value[name]
    return value


def _check_readable(value: Any, path: tuple[str, ...]) -> None:
    if isinstance(value, Unreadable):
        raise FieldError(f"field '{'.'.join(path)}' can't be read: {value.reason}")


def _as_text(value: Any, path: tuple[str, ...], separators: Sequence[str]) -> str:
    _check_readable(value, path)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and separators:
        return separators[0].join(_as_text(each, path, separators[1:]) for each in value)
    if isinstance(value, list):
        raise FieldError(f"field '{'.'.join(path)}' holds lists nested deeper than separators go")
    kind = "null" if value is None else type(value).__name__
    raise FieldError(f"field '{'.'.join(path)}' is or holds {kind}, text was expected")

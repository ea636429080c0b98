"""Plain text as documents: what is held out for evaluation must be whole pieces of text.

A text file has no rows. Where a document ends is for the config to say: at blank lines (paragraphs
are joined until a document is long enough to teach something), before headings, at every line, or
at the end of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from goldcrest.cluster.api import Config
from goldcrest.tasks.data.lines import BadLine, TextLines


class DocumentConfig(Config):
    """Where the documents of plain text files begin and end."""

    split: Literal["blank_lines", "headings", "lines", "file"] = Field(
        "blank_lines",
        description="documents end at blank lines, before headings, at every line, or with the "
        "file",
    )
    min_bytes: int = Field(
        2000,
        ge=1,
        description="blank_lines: paragraphs are joined until a document has this many bytes",
    )
    heading: str = Field(
        r"#+ .*|\s?= [^=].* =\s*",
        description="headings: regular expression that matches the whole of a heading's line; "
        "default: Markdown, and titles of WikiText articles",
    )

    @field_validator("heading")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


@dataclass(frozen=True)
class Document:
    """A document that begins at `line` of its file, or a piece of text that can't be used."""

    line: int
    text: str
    problem: str = ""


class _Open:
    """The document that is being read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reset()

    def _reset(self) -> None:
        self._lines: list[str] = []
        self.size = 0
        self._first = 0
        self.problem = ""
        self._problem_line = 0

    def add(self, number: int, text: str) -> None:
        self._first = self._first or number
        self.size += len(text.encode()) + 1
        if self.size > self._limit + 1:
            self.spoil(self._first, f"the document is longer than {self._limit} bytes")
        if not self.problem:
            self._lines.append(text)

    def spoil(self, number: int, problem: str) -> None:
        if not self.problem:
            self._problem_line, self.problem = number, problem
        self._lines.clear()

    def close(self) -> Iterator[Document]:
        """The document, unless there is nothing in it; afterwards the next one is open."""
        text = "\n".join(self._lines).strip("\n")
        if self.problem:
            yield Document(self._problem_line, "", self.problem)
        elif text.strip():
            yield Document(self._first, text)
        self._reset()


def read_documents(lines: TextLines, cfg: DocumentConfig, limit: int) -> Iterator[Document]:
    """The documents of a text file, in order; one with a bad line or over `limit` bytes is bad.

    Lines end in `\\n` or `\\r\\n`; blank lines at a document's border are left out, all other
    characters stay as they are.
    """
    heading = re.compile(cfg.heading)
    open_document = _Open(limit)
    while True:
        try:
            text = next(lines).removesuffix("\n").removesuffix("\r")
        except BadLine as error:
            open_document.spoil(lines.lines.number, str(error))
            if cfg.split == "lines":
                yield from open_document.close()
            continue
        except StopIteration:
            break
        blank = not text.strip()
        enough = open_document.size >= cfg.min_bytes or open_document.problem
        if (cfg.split == "blank_lines" and blank and enough) or (
            cfg.split == "headings" and heading.fullmatch(text)
        ):
            yield from open_document.close()
        if not blank or open_document.size:
            open_document.add(lines.lines.number, text)
        if cfg.split == "lines":
            yield from open_document.close()
    yield from open_document.close()

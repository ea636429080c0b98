"""Lines of a text file, plain or gzip, in bounded memory: a line that is too long is skipped.

A damaged row must not end a corpus, and a row of 10 MB must not fill the memory. `Lines` therefore
raises `BadLine` for one line and goes on with the next; only a file that can't be read any further
(a truncated or damaged gzip stream) is an InputError, because nobody can say what is missing.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Self, cast

from goldcrest.cluster.api import InputError

_SKIP_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class BadLine(ValueError):  # noqa: N818 - it is the line that is bad
    """One line can't be used; the words say why."""


class Lines:
    """Iterator over the lines of a file as bytes with their ends; a context manager.

    `number` is the line given last, from 1. A byte order mark at the start of the file is left out.
    """

    def __init__(self, path: Path, limit: int) -> None:
        """`limit` is the greatest length of a line in bytes."""
        self._path, self._limit = path, limit
        self.number = 0

    def __enter__(self) -> Self:
        zipped = self._path.suffix.lower() == ".gz"
        opened = gzip.open(self._path) if zipped else self._path.open("rb")
        self._stream = cast(IO[bytes], opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        """The next line; BadLine if it is longer than the limit, InputError if the file is cut."""
        line = self._read(self._limit + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self._limit:
            while line and not line.endswith(b"\n"):
                line = self._read(_SKIP_BYTES)
            raise BadLine(f"the line is longer than {self._limit} bytes")
        return line.removeprefix(_BOM) if self.number == 1 else line

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.readline(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self._path}:{self.number + 1}: the gzip file can't be read further: {error}",
                hint="the file is damaged or not gzip at all: fetch or pack it again",
            ) from error


class TextLines:
    """The same lines as text, without invalid UTF-8: what is not UTF-8 is a BadLine.

    `csv.reader` takes it as it is: an exception in the middle of a file does not end it.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next line with its end."""
        line = next(self.lines)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadLine(f"not valid UTF-8: {error.reason} at byte {error.start}") from error

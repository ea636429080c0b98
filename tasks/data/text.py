"""Text corpora through one interface: whatever the files, a stream of rows with named fields.

Files are found by their names' ends:

* `.jsonl`            a JSON object per line
* `.csv`, `.tsv`      a header, then rows; fields of `.csv` may be quoted and hold line breaks, in
                      `.tsv` a quote is a letter (as most corpora have it) unless asked for
* `.txt`              plain text; every document is a row with the field `text`
* `.parquet`          any columns; the others may also be gzipped: `.jsonl.gz`
* a folder of such files, also in folders inside it; other files there are not looked at
* a Hugging Face dataset: one saved on disk as a folder, or one of the hub, which is streamed:
  `datasets://NAME[/CONFIG][@REVISION][:SPLIT]`, e.g. `datasets://openai/gsm8k/main`

Rows are read one after the other and never kept: a corpus need not fit into memory. A row that
can't be used is given with the reason in `problem`; a file that can't be read is an InputError.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field

from goldcrest.cluster.api import Config, InputError
from goldcrest.tasks.data.corpus import as_text
from goldcrest.tasks.data.documents import DocumentConfig, read_documents
from goldcrest.tasks.data.hub import DATASETS_PREFIX, dataset_reference, load_splits
from goldcrest.tasks.data.lines import BadLine, Lines, TextLines
from goldcrest.tasks.data.templates import Unreadable

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BATCH_ROWS = 64  # decoded at a time: a row may be large
# What `datasets` raises for a streamed file whose content is wrong; what a connection raises, an
# OSError, may pass.
_UNREADABLE = (ValueError, NotImplementedError, EOFError, gzip.BadGzipFile, zlib.error)

# What Arrow raises for a value: text that is not UTF-8, a date out of range, an unknown time zone.
_UNREADABLE_VALUES = (ValueError, OverflowError, KeyError)


class RoleConfig(Config):
    """Which files are for what, by the words of their names (and of folders in the corpus).

    The words of `dev_in_domain.jsonl.gz` are `dev`, `in`, `domain`. A pattern such as `train*` is
    compared with each of them; `test` is looked at first, then `validation`, then `train`.
    """

    test: tuple[str, ...] = Field(("test", "eval"), description="words of files for testing")
    validation: tuple[str, ...] = Field(
        ("dev", "val", "valid", "validation"), description="words of files for validation"
    )
    train: tuple[str, ...] = Field(
        ("*",), description="words of files for training; a file that nothing fits is left out"
    )

    def of(self, name: str) -> Role | None:
        """The role of a file by its name inside the corpus, None where nothing fits."""
        words = [word for word in re.split(r"[^a-z]+", _stem(name).lower()) if word] or [""]
        patterns: tuple[tuple[Role, tuple[str, ...]], ...] = (
            ("test", self.test),
            ("validation", self.validation),
            ("train", self.train),
        )
        for role, wanted in patterns:
            if any(fnmatch.fnmatchcase(word, pattern) for word in words for pattern in wanted):
                return role
        return None


@dataclass(frozen=True)
class TextFile:
    """One file (or one split of a dataset, in `dataset`) of a corpus.

    `name` is unique in a run; `inside` is the name inside the corpus, which tells the role.
    """

    name: str
    inside: str
    path: Path
    kind: str
    dataset: Any = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row by its place: the fields, or why it can't be used."""

    line: int
    fields: Mapping[str, Any]
    problem: str = ""


def corpus_names(paths: Sequence[str]) -> tuple[str, ...]:
    """A short name for every corpus, from the last part of its path, numbered where alike."""
    names: list[str] = []
    for path in paths:
        remote = path.startswith(DATASETS_PREFIX)
        last = path.removeprefix(DATASETS_PREFIX) if remote else Path(path).expanduser().name
        base, count = as_text(last) or "corpus", 2
        name = base
        while name in names:
            name, count = f"{count}-{base}", count + 1
        names.append(name)
    return tuple(names)


def text_files(path: str, name: str) -> list[TextFile]:
    """The files of the corpus at `path`, called `name`, in a fixed order.

    Raises InputError for a path that is not there, is of an unknown kind, or holds no text.
    """
    if (reference := dataset_reference(path)) is not None:
        whole = reference.split or "train"  # the role of what has no splits
        place = Path(reference.name)
        return [
            TextFile(f"{name}/{s}" if s else name, s or whole, place, "dataset", table)
            for s, table in load_splits(reference).items()
        ]
    root = Path(path).expanduser()
    if root.is_file():
        if (kind := _kind(root)) is None:
            raise InputError(
                f"corpus {path} is a file of unknown kind",
                hint=f"give one of {', '.join(SUFFIXES)}, gzipped or not, or a folder of them",
            )
        return [TextFile(name, name, root, kind)]
    if not root.is_dir():
        raise InputError(f"there is no corpus '{path}'", hint="check the path")
    found = [
        TextFile(f"{name}/{inside}", inside, file, kind)
        for file in _visible_files(root)
        if (kind := _kind(file)) is not None
        and (inside := as_text(file.relative_to(root).as_posix()))
    ]
    if not found:
        raise InputError(
            f"corpus {path} holds no text", hint=f"put {', '.join(SUFFIXES)} files there"
        )
    return found


def read_rows(
    file: TextFile,
    documents: DocumentConfig,
    limit: int,
    columns: Sequence[str] | None = None,
    *,
    quoted: Sequence[str] = ("csv",),
) -> Iterator[Row]:
    """The rows of a file, in order; a line or a document over `limit` bytes is a bad row.

    `columns` are the only fields that are wanted, where the format can leave out the others;
    `quoted` the kinds of tables ("csv", "tsv") whose fields may stand in double quotes. Lines count
    from 1, rows of Parquet files and datasets too. Raises InputError for a file that can't be read
    (further).
    """
    count = 0
    if file.kind in _DELIMITERS:
        rows = _table(file, limit, quotes=file.kind.removeprefix(".") in quoted)
    else:
        rows = _READERS[file.kind](file, documents, limit, columns)
    for row in rows:
        count += 1
        yield row
    if count == 0:
        yield Row(1, {}, "the file is empty")


def _jsonl(
    file: TextFile, _: DocumentConfig, limit: int, __: Sequence[str] | None
) -> Iterator[Row]:
    with Lines(file.path, limit) as lines:
        text = TextLines(lines)
        while True:
            try:
                line = next(text)
            except BadLine as error:
                yield Row(lines.number, {}, str(error))
                continue
            except StopIteration:
                return
            if line.strip():
                yield _json_row(line, lines.number)


def _json_row(line: str, number: int) -> Row:
    try:
        row = _JSON.decode(line)
    except (ValueError, RecursionError) as error:  # also numbers of 5000 digits
        return Row(number, {}, f"not a line of JSON: {error}")
    if not isinstance(row, dict):
        return Row(number, {}, f"a JSON object was expected, this is {type(row).__name__}")
    return Row(number, row)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _table(file: TextFile, limit: int, *, quotes: bool) -> Iterator[Row]:
    """Every line of the file is in a row that is given, also where a quote swallowed some."""
    # csv's own limit is one for the whole process: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    with Lines(file.path, limit) as lines:
        reader = csv.reader(
            TextLines(lines),
            delimiter=_DELIMITERS[file.kind],
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )
        header: list[str] | None = None
        while True:
            line = lines.number + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except (BadLine, csv.Error) as error:
                if header is None:
                    raise InputError(f"{file.path}:{line}: no header of CSV: {error}") from error
                yield from _swallowed(line, lines.number, str(error))
                continue
            if header is None:
                header = _csv_header(values, file.path)
            elif len(values) == len(header):
                yield Row(line, dict(zip(header, values, strict=True)))
            elif values:
                problem = f"{len(values)} columns, the header has {len(header)}"
                yield from _swallowed(line, lines.number, problem)


def _swallowed(first: int, last: int, problem: str) -> Iterator[Row]:
    """A bad row for each of the lines that were read as one."""
    if last > first:
        problem += f" (the quotes of line {first} reach to line {last})"
    for line in range(first, max(first, last) + 1):
        yield Row(line, {}, problem)


def _csv_header(names: list[str], path: Path) -> list[str]:
    if not all(names) or len(set(names)) != len(names):
        raise InputError(
            f"{path}:1: the first line must name the columns, each by its own name: {names[:20]}"
        )
    return names


def _plain(
    file: TextFile, documents: DocumentConfig, limit: int, _: Sequence[str] | None
) -> Iterator[Row]:
    with Lines(file.path, limit) as lines:
        for document in read_documents(TextLines(lines), documents, limit):
            yield Row(document.line, {"text": document.text}, document.problem)


def _parquet(
    file: TextFile, _: DocumentConfig, limit: int, columns: Sequence[str] | None
) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path) as table:
            names = set(table.schema_arrow.names)
            wanted = None if columns is None else [name for name in columns if name in names]
            for batch in table.iter_batches(_BATCH_ROWS, columns=wanted or None):
                for row in _rows_of(batch):
                    number += 1
                    yield Row(number, row)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{file.path} row {number + 1}: not readable Parquet: {error}") from error


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """The batch's rows as mappings, with `Unreadable` for values that are none in Python."""
    try:
        return list(batch.to_pylist())
    except _UNREADABLE_VALUES:
        pass  # Arrow checks neither the text nor the dates of a file: find those that are wrong
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    return [
        {name: values[number] for name, values in columns.items()}
        for number in range(batch.num_rows)
    ]


def _values(column: Any) -> list[Any]:
    values: list[Any] = []
    for value in column:
        try:
            values.append(value.as_py())
        except UnicodeDecodeError as error:
            values.append(Unreadable(f"not valid UTF-8: {error.reason}"))
        except _UNREADABLE_VALUES as error:
            values.append(Unreadable(f"no {value.type} that Python knows: {error}"))
    return values


def _dataset(
    file: TextFile, _: DocumentConfig, limit: int, columns: Sequence[str] | None
) -> Iterator[Row]:
    table, number = file.dataset, 0
    # Without any of the columns the rows are still there, each of them bad. What is streamed may
    # not know its columns before it is read (`column_names` is None).
    if wanted := [each for each in columns or () if each in (table.column_names or ())]:
        table = table.select_columns(wanted)
    try:
        for batch in table.with_format("arrow").iter(_BATCH_ROWS):
            for row in _rows_of(batch):
                number += 1
                yield Row(number, row)
    except _UNREADABLE as error:
        message = f"dataset {file.name} can't be read beyond row {number}: {error}"
        raise InputError(message) from error


_READERS = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _plain,
    "dataset": _dataset,
}


def _suffixes(path: Path) -> tuple[str, bool]:
    """The suffix that tells the kind, in lower case, and whether the file is gzipped."""
    zipped = path.suffix.lower() == ".gz"
    return (Path(path.stem) if zipped else path).suffix.lower(), zipped


def _kind(path: Path) -> str | None:
    suffix, zipped = _suffixes(path)
    return None if suffix not in SUFFIXES or (zipped and suffix == ".parquet") else suffix


def _stem(name: str) -> str:
    """A file's name inside its corpus without the suffixes of its kind."""
    bare = name[:-3] if name.lower().endswith(".gz") else name
    return next((bare[: -len(s)] for s in SUFFIXES if bare.lower().endswith(s)), bare)


def _visible_files(root: Path) -> Iterator[Path]:
    """What the corpus's fingerprint is made of: hidden files and folders are left out."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for each in sorted(files):
            if not each.startswith("."):
                yield Path(folder) / each

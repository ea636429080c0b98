"""Speech corpora through one interface: whatever the layout, a list of `Recording`s.

Layouts, found by looking (`layout="auto"`) or stated:

* `metadata`         a folder with metadata.jsonl, .csv or .parquet (`file_name`, and optionally
                     `speaker`, `sex`, `text`), or such a manifest file itself
* `speaker_folders`  one folder per speaker: the name of the first folder level is the speaker
* `bare`             any folder of audio files, unlabelled
* `datasets`         a Hugging Face dataset with an `audio` column: `datasets:NAME_OR_PATH[:SPLIT]`
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.audio import AUDIO_SUFFIXES

Layout = Literal["auto", "metadata", "speaker_folders", "bare"]
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_METADATA_LINE = 1 << 20  # characters: a longer line is not a row of metadata
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One audio file of a corpus and what is known about it (None: not known).

    `id` is unique over all corpora of a run. The audio is at `path`, or, for corpora that carry
    audio inside their tables, in `data`. `kind` tells noises ("noise") and room impulse responses
    ("rir") in packs of both. `problem` says why the recording can't be used.
    """

    id: str
    corpus: str
    path: Path
    data: bytes | None = None
    speaker: str | None = None
    sex: str | None = None
    text: str | None = None
    kind: str | None = None
    problem: str | None = None


def read_corpora(paths: tuple[str, ...], layout: Layout = "auto") -> list[Recording]:
    """The recordings of all corpora in `paths`, in a fixed order, with unique ids.

    Raises InputError for a missing or empty corpus and for metadata that can't be read.
    """
    recordings: list[Recording] = []
    names: set[str] = set()
    for path in paths:
        name = _unique(corpus_name(path), names)
        found = list(read_corpus(path, name, layout))
        if not found:
            raise InputError(
                f"corpus {path} holds no audio",
                hint=f"put {', '.join(sorted(AUDIO_SUFFIXES))} files or a metadata.jsonl there",
            )
        recordings.extend(found)
    return recordings


def corpus_name(path: str) -> str:
    """A short name for a corpus: the last part of its path without suffix."""
    return Path(path.removeprefix(DATASETS_PREFIX).split(":")[0]).stem or "corpus"


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}-{count}", count + 1
    taken.add(candidate)
    return candidate


def read_corpus(path: str, name: str, layout: Layout = "auto") -> Iterator[Recording]:
    """The recordings of one corpus (see the module docstring for layouts)."""
    if path.startswith(DATASETS_PREFIX):
        yield from _read_datasets(path.removeprefix(DATASETS_PREFIX), name)
        return
    root = Path(path).expanduser()
    if root.is_file():
        yield from _read_metadata(root, name)
    elif root.is_dir():
        layout = _detect(root) if layout == "auto" else layout
        if layout == "metadata":
            yield from _read_metadata(_metadata_file(root), name)
        else:
            yield from _read_folder(root, name, labelled=layout == "speaker_folders")
    else:
        raise InputError(f"corpus {path} does not exist", hint="give a folder or a manifest file")


def _detect(root: Path) -> Layout:
    if any((root / name).is_file() for name in METADATA_NAMES):
        return "metadata"
    children = sorted(root.iterdir())
    if any(_is_audio(child) for child in children):
        return "bare"
    return "speaker_folders"


def _is_audio(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in AUDIO_SUFFIXES


def _metadata_file(root: Path) -> Path:
    for name in METADATA_NAMES:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root} has none of {', '.join(METADATA_NAMES)}")


def _read_folder(root: Path, corpus: str, *, labelled: bool) -> Iterator[Recording]:
    for path in sorted(root.rglob("*")):
        if _is_audio(path):
            relative = path.relative_to(root)
            deep_enough = labelled and len(relative.parts) > 1
            yield Recording(
                id=f"{corpus}/{relative.as_posix()}",
                corpus=corpus,
                path=path,
                speaker=relative.parts[0] if deep_enough else None,
            )


def _read_metadata(manifest: Path, corpus: str) -> Iterator[Recording]:
    root = manifest.parent.resolve()
    seen: set[str] = set()
    for place, row in _metadata_rows(manifest):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise InputError(f"{place}: no 'file_name'", hint="every row names its audio file")
        if Path(file_name).suffix.lower() not in AUDIO_SUFFIXES:
            continue  # packs may list images or texts beside the audio
        path = (root / file_name).resolve()
        if not path.is_relative_to(root):
            raise InputError(f"{place}: '{file_name}' lies outside {root}")
        if file_name in seen:
            raise InputError(f"{place}: '{file_name}' is listed twice")
        seen.add(file_name)
        yield Recording(
            id=f"{corpus}/{file_name}",
            corpus=corpus,
            path=path,
            speaker=_text(row, "speaker", place),
            sex=_text(row, "sex", place),
            text=_text(row, "text", place),
            kind=_text(row, "kind", place),
            problem=None if path.is_file() else f"named in {place} but the file is absent",
        )


def _text(row: Mapping[str, Any], field: str, place: str) -> str | None:
    value = row.get(field)
    if value is None or value == "":
        return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: field '{field}' is {type(value).__name__}, text was expected")


def _metadata_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:line", row)` of a .jsonl, .csv or .parquet manifest."""
    if manifest.suffix == ".jsonl":
        yield from _jsonl_rows(manifest)
    elif manifest.suffix == ".csv":
        try:
            with manifest.open(newline="", encoding="utf-8-sig") as stream:
                for number, row in enumerate(csv.DictReader(stream, strict=True), 2):
                    yield f"{manifest}:{number}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{manifest}: not a readable CSV file: {error}") from error
    elif manifest.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(manifest).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{manifest}: not a readable Parquet file: {error}") from error
        for number, row in enumerate(rows, 1):
            yield f"{manifest} row {number}", row
    else:
        raise InputError(
            f"corpus {manifest} is a file of unknown kind", hint="give a .jsonl, .csv or .parquet"
        )


def _jsonl_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with manifest.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_METADATA_LINE + 1):
            number += 1
            place = f"{manifest}:{number}"
            if len(line) > MAX_METADATA_LINE:
                raise InputError(f"{place}: the line is longer than {MAX_METADATA_LINE} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{place}: not a line of UTF-8 JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{place}: a JSON object was expected")
            yield place, row


def _read_datasets(reference: str, corpus: str) -> Iterator[Recording]:
    """A dataset on the hub or saved on disk; audio stays encoded until it is needed."""
    import datasets

    name, _, split = reference.partition(":")
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            table = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"dataset {reference} can't be loaded: {error}") from error
    if "audio" not in table.column_names:
        raise InputError(f"dataset {reference} has no 'audio' column: {table.column_names}")
    if isinstance(table.features["audio"], datasets.Audio):
        table = table.cast_column("audio", datasets.Audio(decode=False))
    for number, row in enumerate(table):
        audio, place = row["audio"], f"{reference} row {number}"
        speaker = row.get("speaker", row.get("speaker_id"))
        yield Recording(
            id=f"{corpus}/{number:08d}",
            corpus=corpus,
            path=Path(audio.get("path") or f"{number:08d}"),
            data=audio.get("bytes"),
            speaker=None if speaker is None else str(speaker),
            sex=_text(row, "sex", place),
            text=_text(row, "text", place),
        )

"""Speech corpora through one interface: whatever the layout, a list of `Recording`s.

Layouts, found by looking (`layout="auto"`) or stated:

* `metadata`         a folder with metadata.jsonl, .csv or .parquet (`file_name`, and optionally
                     `speaker`, `sex`, `text`), or such a manifest file itself
* `speaker_folders`  one folder per speaker: the name of the first folder level is the speaker
* `bare`             any folder of audio files, unlabelled
* `datasets`         a Hugging Face dataset with an `audio` column: one saved on disk as a folder,
                     or one of the hub as `datasets://NAME[/CONFIG][@REVISION][:SPLIT]`
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.audio import AUDIO_SUFFIXES
from goldcrest.tasks.data.hub import (
    DATASETS_PREFIX,
    DatasetReference,
    dataset_reference,
    load_table,
)

Layout = Literal["auto", "metadata", "speaker_folders", "bare"]
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_METADATA_LINE = 1 << 20  # characters: a longer line is not a row of metadata
# Errors of a file's name or its permissions: trying again would not mend them.
_HOPELESS = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EILSEQ)
}
_DATASETS_TEXT = ("text", "sentence", "transcription")  # what datasets call a transcript


@dataclass(frozen=True, eq=False)
class StoredAudio:
    """Encoded audio in a row of a table on disk, read when it is asked for: the audio of a corpus
    need not fit into memory. `size` in bytes."""

    table: Any
    row: int
    size: int

    def read(self) -> bytes:
        """The encoded audio."""
        data: bytes = self.table[self.row]["audio"]["bytes"]
        return data


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One audio file of a corpus and what is known about it (None: not known).

    `id` is unique over all corpora of a run. The audio is at `path`, or, for corpora that carry
    audio inside their tables, in `data` (there, or loaded by `in_memory`). `kind` tells noises
    ("noise") and room impulse responses ("rir") in packs of both. `problem` says why the recording
    can't be used.
    """

    id: str
    corpus: str
    path: Path
    data: StoredAudio | bytes | None = None
    speaker: str | None = None
    sex: str | None = None
    text: str | None = None
    kind: str | None = None
    problem: str | None = None

    def in_memory(self) -> Recording:
        """The recording with the audio that lies in a table: what another process can open."""
        return replace(self, data=self.data.read()) if isinstance(self.data, StoredAudio) else self

    def source(self) -> Path | bytes:
        """What to decode: the file, or the audio itself."""
        if self.data is None:
            return self.path
        return self.data if isinstance(self.data, bytes) else self.data.read()


def recording_of(utterance: str) -> str:
    """The recording that an utterance was cut from, by their ids.

    `corpus/file.wav#003` -> `corpus/file.wav`; a name that only holds a `#` stays.
    """
    stem, mark, number = utterance.rpartition("#")
    return stem if mark and len(number) >= 3 and number.isdigit() else utterance


def read_corpora(
    paths: tuple[str, ...], layout: Layout = "auto", names: tuple[str, ...] | None = None
) -> list[Recording]:
    """The recordings of all corpora in `paths`, in a fixed order, with unique ids.

    `names` are the corpora's names, by default `corpus_names(paths)`. Raises InputError for a
    missing or empty corpus, for metadata that can't be read, and for a file or a dataset that is
    in two corpora.
    """
    _refuse_equal_datasets(paths)
    recordings: list[Recording] = []
    for path, name in zip(paths, names or corpus_names(paths), strict=True):
        found = list(read_corpus(path, name, layout))
        if not found:
            raise InputError(
                f"corpus {path} holds no audio",
                hint=f"put {', '.join(sorted(AUDIO_SUFFIXES))} files or a metadata.jsonl there",
            )
        recordings.extend(found)
    _refuse_doubles(recordings)
    return recordings


def corpus_names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """A short name for every corpus: its folder's or dataset's, numbered where two are alike."""
    taken: list[str] = []
    for path in paths:
        base, count = corpus_name(path), 2
        name = base
        while name in taken:
            name, count = f"{base}-{count}", count + 1
        taken.append(name)
    return tuple(taken)


def corpus_name(path: str) -> str:
    """A short name for one corpus: the folder's, also for a manifest file in it."""
    if path.startswith(DATASETS_PREFIX):
        place = path.removeprefix(DATASETS_PREFIX).partition(":")[0].partition("@")[0]
        return place.rpartition("/")[2] or "corpus"
    full = Path(path).expanduser().absolute()
    name = full.parent.name if full.name in METADATA_NAMES else full.name
    return as_text(name.removesuffix(".jsonl").removesuffix(".csv")) or "corpus"


def manifest_folders(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The folders of those corpora that are given as manifest files: their audio lies there."""
    files = [Path(path).expanduser() for path in paths if "://" not in path]
    return tuple(str(path.parent) for path in files if path.is_file())


def as_text(name: str) -> str:
    """A file name as text that UTF-8 can hold: bytes that are not UTF-8 become `\\xNN`."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can name: no file's name
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _refuse_doubles(recordings: list[Recording]) -> None:
    """One file in two corpora would be in training and in evaluation."""
    seen: dict[Path, str] = {}
    for recording in recordings:
        if recording.data is None and recording.problem is None:
            first = seen.setdefault(recording.path.resolve(), recording.id)
            if first != recording.id:
                raise InputError(
                    f"{recording.path} is in two corpora ({first}, {recording.id})",
                    hint="give every folder once, and none inside another",
                )


def _refuse_equal_datasets(paths: tuple[str, ...]) -> None:
    """A dataset has no files that could be compared, but it has one name, or one folder."""
    seen: dict[tuple[str, str], str] = {}
    for path in paths:
        if (reference := dataset_reference(path)) is None:
            continue
        if reference.identity in seen:
            raise InputError(
                f"the dataset {path} is in two corpora (it is also given as "
                f"{seen[reference.identity]})",
                hint="give every dataset once, or different splits of it",
            )
        seen[reference.identity] = path


def refuse_shared_audio(training: Iterable[Recording], evaluation: Iterable[Recording]) -> None:
    """InputError for a recording in a table to train on that is in one to evaluate on as well.

    Only what has the size of another is read; for files see `read_corpora`.
    """
    tested: dict[int, list[Recording]] = {}
    for recording in evaluation:
        if isinstance(recording.data, StoredAudio):
            tested.setdefault(recording.data.size, []).append(recording)
    digests: dict[int, dict[bytes, str]] = {}
    for recording in training:
        if not isinstance(recording.data, StoredAudio) or recording.data.size not in tested:
            continue
        size = recording.data.size
        if size not in digests:
            digests[size] = {_sha256(other): other.id for other in tested[size]}
        same = digests[size].get(_sha256(recording))
        if same is not None:
            raise InputError(
                f"{recording.id} would be trained on, but {same} is the same recording",
                hint="take it out of the corpora for training or of those for evaluation",
            )


def _sha256(recording: Recording) -> bytes:
    source = recording.source()
    assert isinstance(source, bytes)
    return hashlib.sha256(source).digest()


def read_corpus(path: str, name: str, layout: Layout = "auto") -> Iterator[Recording]:
    """The recordings of one corpus (see the module docstring for layouts)."""
    if (reference := dataset_reference(path)) is not None:
        yield from _read_dataset(reference, name)
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
    for path in _visible_files(root):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            relative = path.relative_to(root)
            speaker = relative.parts[0] if labelled and len(relative.parts) > 1 else None
            yield Recording(
                id=f"{corpus}/{as_text(relative.as_posix())}",
                corpus=corpus,
                path=path,
                speaker=None if speaker is None else as_text(speaker),
            )


def _visible_files(root: Path) -> list[Path]:
    """Files below `root` in a fixed order; links are followed, hidden names left out."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _refuse(error: OSError) -> None:
    """A folder of a speaker that can't be listed must not be left out in silence."""
    raise InputError(
        f"the folder {error.filename} can't be read: {error.strerror}",
        hint="make it readable, or take it away",
    ) from error


def _read_metadata(manifest: Path, corpus: str) -> Iterator[Recording]:
    root = manifest.parent.resolve()
    seen: set[str] = set()
    for place, row in _metadata_rows(manifest):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise InputError(f"{place}: no 'file_name'", hint="every row names its audio file")
        if Path(file_name).suffix.lower() not in AUDIO_SUFFIXES:
            continue  # packs may list images or texts beside the audio
        path, problem = _named_file(root, file_name, place)
        if path is not None and not path.is_relative_to(root):
            raise InputError(f"{place}: '{file_name}' lies outside {root}")
        if file_name in seen:
            raise InputError(f"{place}: '{file_name}' is listed twice")
        seen.add(file_name)
        yield Recording(
            id=f"{corpus}/{as_text(file_name)}",
            corpus=corpus,
            path=path or manifest,
            speaker=_text(row, "speaker", place),
            sex=_text(row, "sex", place),
            text=_text(row, "text", place),
            kind=_text(row, "kind", place),
            problem=problem,
        )


def _named_file(root: Path, name: str, place: str) -> tuple[Path | None, str | None]:
    """The file that a row names, links followed, and why it can't be used (None: it can).

    Among millions of rows one that no file can be called by is that row's problem.
    """
    try:
        path = (root / name).resolve()
        absent = not path.is_file()
    except OSError as error:
        if error.errno not in _HOPELESS:
            raise
        return None, f"named in {place} but can't be opened: {error.strerror}"
    except (ValueError, RuntimeError) as error:  # NUL, half a surrogate pair; links in a circle
        return None, f"named in {place} but no file can be called so: {error}"
    return path, f"named in {place} but the file is absent" if absent else None


def _text(row: Mapping[str, Any], field: str, place: str) -> str | None:
    value = row.get(field)
    if value is None or value == "":
        return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        text = str(value)
        if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
            return text
        raise InputError(f"{place}: field '{field}' holds half a surrogate pair: not UTF-8 text")
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
            except (ValueError, RecursionError) as error:  # also numbers of 5000 digits
                raise InputError(f"{place}: not a line of UTF-8 JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{place}: a JSON object was expected")
            yield place, row


def _read_dataset(reference: DatasetReference, corpus: str) -> Iterator[Recording]:
    """A dataset on the hub or saved on disk; audio stays there, encoded, until it is needed."""
    import datasets

    table = load_table(reference)
    if "audio" not in table.column_names:
        raise InputError(f"dataset {reference} has no 'audio' column: {table.column_names}")
    if isinstance(table.features["audio"], datasets.Audio):
        table = table.cast_column("audio", datasets.Audio(decode=False))
    only_audio = table.select_columns("audio")
    for number, row in enumerate(table):
        audio, place = row["audio"], f"{reference} row {number}"
        if not isinstance(audio, dict):
            kind = type(audio).__name__
            raise InputError(f"dataset {place}: 'audio' is {kind}, not a path or encoded bytes")
        data = audio.get("bytes")
        speaker = row.get("speaker", row.get("speaker_id"))
        yield Recording(
            id=f"{corpus}/{number:08d}",
            corpus=corpus,
            path=Path(audio.get("path") or f"{number:08d}"),
            data=None if data is None else StoredAudio(only_audio, number, len(data)),
            speaker=None if speaker is None else str(speaker),
            sex=_text(row, "sex", place),
            text=_text(row, next((n for n in _DATASETS_TEXT if n in row), "text"), place),
        )

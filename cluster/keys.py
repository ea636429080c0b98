"""Keys: what an artifact's content address is made of.

    key = sha256(task, version, canonical config, keys of the inputs, seed)

The canonical config leaves out fields marked `DoesNotChangeResult` and replaces fields marked
`InputFiles` by the fingerprint of the files' content, so moving a corpus changes no key and editing
one file of it does. Fingerprints are remembered per file by place, size, inode and both times (of
content and of inode), so that a corpus of 100 GB is read once and listed afterwards.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import hashlib
import os
import sqlite3
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from goldcrest.cluster.api import DoesNotChangeResult, InputFiles, canonical_json
from goldcrest.cluster.artifact import sha256_file
from goldcrest.cluster.errors import InputError

KEY_SCHEMA = 1
"""Part of every key: raise it when the meaning of a key changes."""

_SETTLED = 2.0  # seconds after its last change before a file's fingerprint may be remembered
_HASHING_THREADS = 8


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def step_key(
    *,
    task: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    seed: int | None,
) -> str:
    """The content address of a step's result; `seed` is None for a task without randomness."""
    parts = {"task": task, "version": version, "config": config, "inputs": inputs, "seed": seed}
    return digest({"schema": KEY_SCHEMA, **parts})


def canonical_config(config: BaseModel, fingerprints: Fingerprints) -> dict[str, Any]:
    """`config` as plain JSON values, one form per meaning.

    Raises InputError, naming the field, for files that are absent and values without a plain form.
    """
    return _canonical_model(config, fingerprints, "")


def _canonical_model(config: BaseModel, fingerprints: Fingerprints, place: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        where = f"{place}{name}"
        value = getattr(config, name)
        if _marked(info, DoesNotChangeResult):
            continue
        if _marked(info, InputFiles):
            plain[name] = _content(value, fingerprints, where)
        else:
            plain[name] = _plain(value, fingerprints, where)
    return plain


def _marked(info: FieldInfo, marker: object) -> bool:
    """Whether `marker` stands on the field or anywhere inside its type."""
    return any(found is marker for found in info.metadata) or _inside(info.annotation, marker)


def _inside(annotation: Any, marker: object) -> bool:
    if any(found is marker for found in getattr(annotation, "__metadata__", ())):
        return True
    return any(_inside(inner, marker) for inner in typing.get_args(annotation))


def _content(value: Any, fingerprints: Fingerprints, where: str) -> Any:
    """The value of an `InputFiles` field with every name replaced by what the files hold."""
    if value is None:
        return None
    if isinstance(value, str | PurePath):
        try:
            return fingerprints.of(value)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", hint=error.hint) from None
    if isinstance(value, Mapping):
        return {str(k): _content(v, fingerprints, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_content(v, fingerprints, f"{where}[{i}]") for i, v in enumerate(value)]
    raise InputError(f"{where}: {value!r} does not name files")


def _plain(value: Any, fingerprints: Fingerprints, where: str) -> Any:
    if isinstance(value, BaseModel):
        return _canonical_model(value, fingerprints, f"{where}.")
    if isinstance(value, enum.Enum):
        return _plain(value.value, fingerprints, where)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"{where}: {value} is not a number that a key can hold")
        return value + 0.0  # minus zero becomes zero: they are equal
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, fingerprints, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(v, fingerprints, where) for v in value), key=canonical_json)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(v, fingerprints, f"{where}[{i}]") for i, v in enumerate(value)]
    kind = type(value).__name__
    raise InputError(
        f"{where}: a {kind} has no plain form", hint="use numbers, text, lists, dicts or a Config"
    )


def default_cache() -> Path:
    """Where fingerprints of input files are remembered on this machine."""
    base = os.environ.get("GOLDCREST_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "goldcrest" / "fingerprints.sqlite"


class Fingerprints:
    """Content fingerprints of files and folders, remembered in a small SQLite file.

    Hidden files (names that start with a dot) do not count: desktops drop them unasked.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = default_cache() if cache is None else cache
        self._seen: dict[str, dict[str, Any]] = {}
        self.hashed_bytes = 0  # read so far, to see that the memory works

    def of(self, name: str | PurePath) -> dict[str, Any]:
        """What the file or folder `name` holds, without its place.

        A name with a scheme, such as `hf://datasets/a/b`, is taken by name: it names a version of
        its content, or the caller pins one. What names a part of a folder of this machine, such as
        `datasets:///data/saved:test`, is taken by the folder's content. Raises InputError for a
        local name without files, and for one whose files can't be read.
        """
        text = str(name)
        scheme, separator, place = text.partition("://")
        if not separator or scheme == "file":
            return self._of_path(text)
        folder, _, part = place.partition(":")
        if folder.startswith("/") and os.path.isdir(folder):  # noqa: PTH112 - never raises
            return {**self._of_path(folder), "scheme": scheme, "part": part}
        return {"name": text}

    def _of_path(self, text: str) -> dict[str, Any]:
        path = Path(unquote(urlparse(text).path)) if text.startswith("file://") else Path(text)
        try:
            place = str(path.expanduser().resolve())
            if place not in self._seen:
                self._seen[place] = self._fingerprint(Path(place), text)
        except OSError as error:
            raise InputError(
                f"{error.filename or repr(text)} can't be read: {error.strerror or error}",
                hint="its content is part of the key; make it readable, or take it away",
            ) from error
        except (ValueError, RuntimeError) as error:  # a NUL; links in a circle
            raise InputError(f"{text!r} can't be the name of a file: {error}") from error
        return self._seen[place]

    def _fingerprint(self, root: Path, text: str) -> dict[str, Any]:
        if root.is_file():
            members = {"": root}
        elif root.is_dir():
            members = {path.relative_to(root).as_posix(): path for path in _visible_files(root)}
        else:
            raise InputError(f"there is no file or folder '{text}'", hint="check the path")
        if not members:
            raise InputError(f"the folder '{text}' holds no files", hint="check the path")
        with self._memory() as memory:
            sums = self._sums(memory, root, list(members.values()))
        lines = [[name, sums[path]] for name, path in sorted(members.items())]
        return {"content": digest(lines), "files": len(lines)}

    @contextlib.contextmanager
    def _memory(self) -> Iterator[sqlite3.Connection]:
        """The SQLite file, or one in memory where the disk allows none."""
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            memory = sqlite3.connect(self._cache, timeout=30.0)
            memory.execute(_TABLE)
        except (OSError, sqlite3.Error):
            memory = sqlite3.connect(":memory:")
            memory.execute(_TABLE)
        try:
            yield memory
        finally:
            memory.close()

    def _sums(
        self, memory: sqlite3.Connection, root: Path, paths: Sequence[Path]
    ) -> dict[Path, str]:
        """SHA-256 of every file, read only where the file is not the remembered one."""
        below = f"{root}/"
        rows = memory.execute(
            "SELECT path, stamp, sha256 FROM file WHERE path = ? OR (path >= ? AND path < ?)",
            (str(root), below, below[:-1] + chr(ord("/") + 1)),
        )
        known = {path: (stamp, sha256) for path, stamp, sha256 in rows}
        stamps = {path: _stamp(path) for path in paths}
        sums = {
            path: known[str(path)][1]
            for path in paths
            if known.get(str(path), ("", ""))[0] == stamps[path]
        }
        missing = [path for path in paths if path not in sums]
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            sums.update(zip(missing, pool.map(sha256_file, missing), strict=True))
        self.hashed_bytes += sum(path.stat().st_size for path in missing)
        self._remember(memory, [p for p in missing if _stamp(p) == stamps[p]], stamps, sums)
        return sums

    @staticmethod
    def _remember(
        memory: sqlite3.Connection,
        paths: Sequence[Path],
        stamps: Mapping[Path, str],
        sums: Mapping[Path, str],
    ) -> None:
        # A file changed in this very moment may change again without a new time stamp: not yet.
        limit = time.time() - _SETTLED
        rows = [
            (str(path), stamps[path], sums[path])
            for path in paths
            if max(path.stat().st_mtime, path.stat().st_ctime) < limit
        ]
        with contextlib.suppress(sqlite3.Error), memory:  # a full disk only costs time
            memory.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", rows)


_TABLE = "CREATE TABLE IF NOT EXISTS file (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)"


def _refuse(error: OSError) -> None:
    raise error


def _stamp(path: Path) -> str:
    """Changes whenever the file's content may have changed; nobody can set the inode's time."""
    facts = path.stat()
    return f"{facts.st_size}.{facts.st_ino}.{facts.st_mtime_ns}.{facts.st_ctime_ns}"


def _visible_files(root: Path) -> Iterator[Path]:
    # A folder that can't be listed is an error: a corpus without it would be another corpus.
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path

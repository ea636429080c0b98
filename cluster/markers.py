"""Marks on config fields that decide how the field enters an artifact's key."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema


class _Marker:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


DoesNotChangeResult = _Marker("DoesNotChangeResult")
"""`Annotated[int, DoesNotChangeResult]`: the field stays out of the artifact's key."""

_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("folder", default=None)


@contextlib.contextmanager
def relative_to(folder: Path) -> Iterator[None]:
    """Configs made inside take relative names of files from `folder`, not from this process's own
    working directory: for a worker that makes a config of what was typed elsewhere."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def absolute_files(value: Any) -> Any:
    """`value` with every local name of a file made absolute; other values come back as they are.

    Links are not followed: the last part of a name may be what a corpus is called.
    """
    if isinstance(value, Mapping):
        return {key: absolute_files(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(absolute_files(inner) for inner in value)
    if isinstance(value, PurePath):
        return type(value)(_absolute(str(value)))
    return _absolute(value) if isinstance(value, str) else value


def _absolute(name: str) -> str:
    if name.startswith("file://"):
        name = unquote(urlparse(name).path)
    if not name or "://" in name:
        return name
    if "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~somebody, who has no home here
        raise ValueError(f"{name!r}: {error}") from None
    return str((_folder.get() or Path.cwd()) / path)


class _InputFiles(_Marker):
    """Makes names absolute while the config is validated, in the folder where they were typed: the
    key is made of the files' content there, but a worker opens them in a folder of its own."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(absolute_files, handler(source))


InputFiles = _InputFiles("InputFiles")
"""`Annotated[str, InputFiles]` (or a tuple of them, or None): the field names files or folders
outside the store; their *content* enters the artifact's key, not their place. Relative names are
made absolute; names with a scheme (`datasets://...`) stay."""

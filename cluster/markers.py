"""Marks on config fields that decide how the field enters an artifact's key."""

from __future__ import annotations


class _Marker:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


DoesNotChangeResult = _Marker("DoesNotChangeResult")
"""`Annotated[int, DoesNotChangeResult]`: the field stays out of the artifact's key."""

InputFiles = _Marker("InputFiles")
"""`Annotated[str, InputFiles]` (or a tuple of them, or None): the field names files or folders
outside the store; their *content* enters the artifact's key, not their place."""

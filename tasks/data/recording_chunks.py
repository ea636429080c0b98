"""A corpus of recordings in pieces that one worker can hold, encoded and decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from goldcrest.tasks.data import audio
from goldcrest.tasks.data.corpus import Recording

SplitT = TypeVar("SplitT", bound=str)
_CHUNK_BYTES = 16 << 20  # encoded audio handed to one worker at a time
_CHUNK_FILES = 256
_CHUNK_SECONDS = 1800.0  # of decoded audio, 58 MB: what one worker gives back at once


def chunks(
    recordings: Sequence[Recording], splits: Sequence[SplitT]
) -> Iterator[tuple[list[Recording], Sequence[SplitT]]]:
    """The recordings in order, in lists of bounded size, each with the splits of its recordings.

    Audio in tables is read as the lists are taken, so a worker can open what it is given.
    """
    chosen: list[Recording] = []
    size, seconds = 0, 0.0
    for place, stored in enumerate(recordings, 1):
        recording = stored.in_memory()
        chosen.append(recording)
        size += _encoded_bytes(recording)
        seconds += _header_seconds(recording)
        full = size >= _CHUNK_BYTES or len(chosen) >= _CHUNK_FILES or seconds >= _CHUNK_SECONDS
        if full or place == len(recordings):
            yield chosen, splits[place - len(chosen) : place]
            chosen, size, seconds = [], 0, 0.0


def _encoded_bytes(recording: Recording) -> int:
    if recording.problem is not None:
        return 0
    if isinstance(recording.data, bytes):
        return len(recording.data)
    try:
        return recording.path.stat().st_size
    except OSError:
        return 0  # the worker says why


def _header_seconds(recording: Recording) -> float:
    """What a recording will be when it is decoded: a few bytes may hold hours."""
    if recording.problem is not None:
        return 0.0
    try:
        return audio.read_header(recording.source()).seconds
    except audio.AudioError:
        return 0.0  # the worker says why

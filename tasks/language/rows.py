"""Rows of a tokens artifact for a family of models: files verified, opened, and checked against the
model that is to read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from goldcrest.cluster.api import Artifact, InputError
from goldcrest.tasks.data.speech_rows import SpeechReader, features_file
from goldcrest.tasks.data.tokens import TokenReader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def rows_file(tokens: Artifact, split: str) -> Path:
    """The token file of a split, verified, as are the features beside it where there are some."""
    path = tokens.file(f"{split}.arrow")
    beside = features_file(path).name
    if beside in tokens:
        tokens.file(beside)
    return path


def open_rows(path: Path, family: str) -> TokenReader:
    """The rows in a token file; a speech model's come with features.

    Raises InputError for a speech model where there are none.
    """
    if family != "speech":
        return TokenReader(path)
    if not features_file(path).is_file():
        raise InputError(
            "the rows of tokens have no features, and a speech model reads audio",
            hint="set tokens.family to speech",
        )
    return SpeechReader(path)


def window_frames(config: PreTrainedConfig) -> int:
    """Frames of a speech model's window; InputError for a model that reads something else."""
    return _window(config)[0]


def check_speech(reader: TokenReader, config: PreTrainedConfig) -> None:
    """InputError for rows of speech that the model's encoder can't read."""
    from goldcrest.kernels.frontend.whisper_mel import longest

    if not isinstance(reader, SpeechReader):
        return
    frames, bins = _window(config)
    if len(reader) and reader.mel_bins != bins:
        raise InputError(
            f"the rows have {reader.mel_bins} mel bins, the model reads {bins}",
            hint=f"set tokens.speech.mel_bins to {bins}",
        )
    if int(reader.frames.max(initial=0)) > longest(frames):
        raise InputError(
            f"an utterance is longer than the {frames / 100:g} s that the model reads at once",
            hint=f"set speech.max_seconds to {frames / 100:g}",
        )


def _window(config: PreTrainedConfig) -> tuple[int, int]:
    from goldcrest.kernels.language.architectures import speech_window

    try:
        return speech_window(config)
    except ValueError as error:
        raise InputError(
            f"{error}: it can be loaded and stored, not trained or measured",
            hint="take a Whisper",
        ) from error

"""Rows of speech on disk: the tokens of a transcript, and beside them the features of its audio.

Two files whose rows go together: `train.arrow` (tasks/data/tokens.py) has the transcripts,
`train.features.arrow` (tasks/data/frames.py) the features. Both are read by memory map: a corpus
need not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.data.tokens import TokenReader, TokenRow


def features_file(tokens: Path) -> Path:
    """The file of features that lies beside a file of token rows."""
    return tokens.with_name(f"{tokens.stem}.features.arrow")


def _no_frames() -> np.ndarray:
    return np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class SpeechRow(TokenRow):
    """A transcript in `answer` (there is no prompt) and the `features` (T, M) float32 of what was
    said, M mel bins; the last frame is silence."""

    features: np.ndarray = field(default_factory=_no_frames)


class SpeechReader(TokenReader):
    """Rows of speech by number. Cheap to send to another process: only the path travels.

    `frames` (N,) int64 are frames per row, `mel_bins` the features of a frame.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises ValueError where the two files have different numbers of rows."""
        super().__init__(path)
        self._features = FrameReader(features_file(self.path))
        if len(self._features) != len(self):
            raise ValueError(
                f"{self.path} has {len(self)} transcripts, {self._features.path} "
                f"{len(self._features)} utterances"
            )
        self.frames, self.mel_bins = self._features.lengths, self._features.dimensions

    def __reduce__(self) -> tuple[type[SpeechReader], tuple[Path]]:
        return (SpeechReader, (self.path,))

    def __getitem__(self, row: int) -> SpeechRow:
        """The row; its tokens are views of the mapped file, which must not be written to."""
        text = super().__getitem__(row)
        return SpeechRow(text.prompt, text.answer, text.starts, self._features[row])

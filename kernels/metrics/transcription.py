"""Word and character error rates of transcripts, by jiwer.

    WER = (substitutions + deletions + insertions) / words of the reference, over the whole corpus

Percent; above 100 where a transcript is longer than its reference. Of several references the one
with the fewest edits counts. Characters include spaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from goldcrest.kernels.metrics.additive import Additive, ratio


def word_error_rate(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """WER, percent, of N transcripts."""
    import jiwer

    return _error_rate(jiwer.process_words, answers, references)


def character_error_rate(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """CER, percent, of N transcripts."""
    import jiwer

    return _error_rate(jiwer.process_characters, answers, references)


def plain_words(text: str) -> str:
    """`text` in lower case, without punctuation, spaces single: what a comparison of speech hears.

    Punctuation is that of Unicode. Combining marks stay: in Hindi they are the vowels.
    """
    return str(_plainer()(text))


@functools.cache
def _plainer() -> Callable[[str], Any]:
    import jiwer

    steps = [
        jiwer.ToLowerCase(),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
    ]
    return jiwer.Compose(steps)


def _error_rate(
    align: Callable[..., Any], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Additive:
    edits, lengths = [], []
    for answer, known in zip(answers, references, strict=True):
        if not known:
            raise ValueError("an example has no reference")
        found = [_edits(align(each, answer)) for each in known]
        fewest = min(found, key=lambda pair: pair[0])
        edits.append(fewest[0])
        lengths.append(fewest[1])
    return ratio(np.array(edits, np.float64), np.array(lengths, np.float64), 100.0)


def _edits(output: Any) -> tuple[int, int]:
    """Edits, and units of the reference."""
    edits = output.substitutions + output.deletions + output.insertions
    return edits, output.hits + output.substitutions + output.deletions

"""Whether an answer is right: exact match, and the final number of a GSM8K solution.

Source: K. Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168: a
solution ends with a line "#### 42"; an answer counts if that number is the reference's. Numbers are
compared as numbers (1,000 is 1000.0), the first "####" of a text counts, as in the authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from goldcrest.kernels.metrics.additive import Additive, mean

_FINAL = re.compile(r"####\s*\$?\s*(-?\$?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)")


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """Percent of N answers that are one of their references, white space apart."""
    hits = [
        _words(answer) in {_words(each) for each in known}
        for answer, known in zip(answers, references, strict=True)
    ]
    return mean(np.array(hits, np.float64), 100.0)


def gsm8k(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """Percent of N answers whose final number is that of one of their references.

    Raises ValueError for an example whose references hold no final number.
    """
    hits = [
        final_number(answer) in numbers
        for answer, numbers in zip(answers, final_numbers(references), strict=True)
    ]
    return mean(np.array(hits, np.float64), 100.0)


def final_numbers(references: Sequence[Sequence[str]]) -> list[set[Decimal]]:
    """The final numbers of N examples' references.

    Raises ValueError for an example whose references hold none.
    """
    found = []
    for place, known in enumerate(references):
        numbers = {number for each in known if (number := final_number(each)) is not None}
        if not numbers:
            raise ValueError(
                f"reference {place} has no final number after '####': {' '.join(known)[:80]!r}"
            )
        found.append(numbers)
    return found


def final_number(text: str) -> Decimal | None:
    """The number after the first "####" of a text, None if there is none."""
    found = _FINAL.search(text)
    if found is None:
        return None
    return Decimal(found[1].replace(",", "").replace("$", ""))


def _words(text: str) -> str:
    return " ".join(text.split())

"""ROUGE of summaries and descriptions: mean F measure over examples.

Source: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004: ROUGE-N is the
overlap of n-grams (section 2), ROUGE-L the longest common subsequence (section 3.1), here with
equal weight of precision and recall. Of several references the best counts.

Words are runs of a-z and 0-9 in lower case, without stemming, as in Google's rouge-score, whose
values these are (the tests compare them). That package itself is not maintained and loads the whole
of NLTK for a stemmer. Text in other alphabets has no such words and scores 0.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from goldcrest.kernels.metrics.additive import Additive, mean

_WORDS = re.compile(r"[a-z0-9]+")
Overlap = Callable[[Sequence[str], Sequence[str]], float]


def rouge_n(n: int, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """ROUGE-N, percent, of N answers with one or more references each; `n` words per n-gram."""
    return _best(functools.partial(_ngram_f, n), answers, references)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """ROUGE-L, percent, of N answers with one or more references each."""
    return _best(_subsequence_f, answers, references)


def _best(
    overlap: Overlap, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Additive:
    values = []
    for answer, known in zip(answers, references, strict=True):
        if not known:
            raise ValueError("an example has no reference")
        words = _WORDS.findall(answer.lower())
        values.append(max(overlap(words, _WORDS.findall(each.lower())) for each in known))
    return mean(np.array(values, np.float64), 100.0)


def _ngram_f(n: int, words: Sequence[str], reference: Sequence[str]) -> float:
    found, wanted = _ngrams(words, n), _ngrams(reference, n)
    return _f_measure((found & wanted).total(), found.total(), wanted.total())


def _subsequence_f(words: Sequence[str], reference: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    return _f_measure(LCSseq.similarity(words, reference), len(words), len(reference))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f_measure(common: int, found: int, wanted: int) -> float:
    """Harmonic mean of common / found and common / wanted."""
    return 2 * common / (found + wanted) if common else 0.0

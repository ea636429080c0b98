"""ROUGE of summaries and descriptions: mean F measure over examples, by Google's rouge-score.

Source: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004: overlap of
n-grams (ROUGE-1, ROUGE-2) and longest common subsequence (ROUGE-L). Of several references the best
counts.
Words are runs of a-z and 0-9 in lower case, not stemmed: text in other alphabets scores 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from goldcrest.kernels.metrics.additive import Additive, mean


def rouge(kind: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """Mean F measure, percent, of N answers; `kind` is rouge1, rouge2 or rougeL."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    values = [
        scorer.score_multi(known, answer)[kind].fmeasure
        for answer, known in zip(answers, references, strict=True)
    ]
    return mean(np.array(values, np.float64), 100.0)


rouge1 = functools.partial(rouge, "rouge1")
rouge2 = functools.partial(rouge, "rouge2")
rouge_l = functools.partial(rouge, "rougeL")

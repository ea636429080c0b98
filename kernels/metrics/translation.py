"""BLEU, chrF and TER of translations (and of other text against references), by sacrebleu.

Sources: K. Papineni et al., ACL 2002 (BLEU); M. Popovic, WMT 2015 (chrF); M. Snover et al., AMTA
2006 (TER); M. Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018 (sacrebleu). Settings
are sacrebleu's defaults: BLEU with 13a tokens, exponential smoothing; chrF2 on 6-grams of
characters; TER on tercom tokens. All are percent; TER is an error rate.

sacrebleu's own intervals are of the same kind as ours, but of its own seed; both are computed from
the statistics per sentence, which is why they are taken out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goldcrest.kernels.metrics.additive import Additive, FloatArray

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """BLEU, 0 to 100, of N answers with one or more references each."""
    from sacrebleu.metrics.bleu import BLEU

    # force: sacrebleu would warn of text that looks tokenized; what a model writes may look so.
    return _additive(BLEU(force=True), answers, references)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """chrF2, 0 to 100, of N answers with one or more references each."""
    from sacrebleu.metrics.chrf import CHRF

    return _additive(CHRF(), answers, references)


def ter(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """Translation edit rate, percent, of N answers with one or more references each."""
    from sacrebleu.metrics.ter import TER

    return _additive(TER(), answers, references)


def _additive(
    metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Additive:
    """The metric with its statistics per sentence: the pair that sacrebleu's bootstrap uses too."""
    if any(not known for known in references):
        raise ValueError("an example has no reference")
    most = max((len(known) for known in references), default=0)
    # sacrebleu wants one list per place of a reference; None where an example has no more.
    streams: list[Any] = [
        [known[place] if place < len(known) else None for known in references]
        for place in range(most)
    ]
    statistics = metric._extract_corpus_statistics(list(answers), streams) if most else []

    def score(sums: FloatArray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return Additive(np.array(statistics, np.float64).reshape(len(answers), -1), score)

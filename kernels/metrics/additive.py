"""Metrics that depend on sums over examples alone, and their bootstrap intervals.

Perplexity, exact match, BLEU, chrF, TER, ROUGE, WER: each is a function of a few numbers that every
example adds to (log probabilities and tokens; matched and possible n-grams; edits and words). Keep
these numbers per example, and the value on any resampled list of examples is one weighted sum away.

Sources: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile
interval); P. Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004
(resampling of sentences; both systems on the same resampled list).

N examples   S numbers that an example adds to   R bootstrap replicates
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_BLOCK = 1 << 22  # numbers in a block of resampling weights


@dataclass(frozen=True)
class Additive:
    """A corpus metric on N examples."""

    statistics: FloatArray  # (N, S) what each example adds
    score: Callable[[FloatArray], float]  # sums (S,) -> the metric's value

    @property
    def value(self) -> float:
        """The metric over all examples.

        Raises ValueError where there are none.
        """
        if len(self.statistics) == 0:
            raise ValueError("there is no example to compute the metric on")
        return self.score(self.statistics.sum(axis=0))

    def each(self) -> FloatArray:
        """(N,) the metric of every example on its own."""
        return np.array([self.score(row) for row in self.statistics])


def ratio(numerators: FloatArray, denominators: FloatArray, factor: float = 1.0) -> Additive:
    """`factor` times the quotient of two sums over N examples: (N,), (N,).

    A denominator of 0 counts as 1, as jiwer has it: words where the reference has none are errors.
    """

    def score(sums: FloatArray) -> float:
        return factor * float(sums[0] / (sums[1] or 1.0))

    return Additive(np.stack([numerators, denominators], axis=1).astype(np.float64), score)


def mean(values: FloatArray, factor: float = 1.0) -> Additive:
    """`factor` times the mean of one number per example, (N,)."""
    return ratio(np.asarray(values, np.float64), np.ones(len(values)), factor)


def bootstrap_interval(
    metric: Additive, *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric over resampled examples.

    Args:
        metric: the metric with its N examples.
        replicates: R, number of resampled lists of N examples.
        level: coverage, such as 0.95.
        seed: seed of the resampling; two metrics of the same N see the same lists.

    Raises:
        ValueError: no examples; fewer than 1 replicate; a level outside (0, 1).
    """
    values = [metric.score(sums) for sums in _resampled(metric, replicates, level, seed)]
    return _percentiles(values, level)


def bootstrap_difference(
    metric: Additive, other: Additive, *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `metric` minus `other` on the same N examples.

    Paired: both are computed on the same resampled lists, so what makes an example hard for both
    cancels out, and the interval is far narrower than the two apart would suggest.

    Raises ValueError as `bootstrap_interval` does, and for metrics of different examples.
    """
    if len(metric.statistics) != len(other.statistics):
        raise ValueError(
            f"a paired comparison needs the same examples, not {len(metric.statistics)} and "
            f"{len(other.statistics)}"
        )
    pairs = zip(
        _resampled(metric, replicates, level, seed),
        _resampled(other, replicates, level, seed),
        strict=True,
    )
    return _percentiles([metric.score(a) - other.score(b) for a, b in pairs], level)


def _resampled(metric: Additive, replicates: int, level: float, seed: int) -> Iterator[FloatArray]:
    """Sums (S,) over `replicates` resampled lists of examples."""
    count = len(metric.statistics)
    if count == 0:
        raise ValueError("there is no example to resample")
    if replicates < 1 or not 0 < level < 1:
        raise ValueError("replicates must be at least 1 and level in (0, 1)")
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // count)
    for done in range(0, replicates, step):
        rows = min(step, replicates - done)
        # How often each example is drawn in N draws with replacement.
        weights = rng.multinomial(count, np.full(count, 1 / count), size=rows)
        yield from weights @ metric.statistics


def _percentiles(values: list[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

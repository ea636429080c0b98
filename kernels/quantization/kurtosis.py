"""Which operations to leave unquantized: rankings by what their input activations look like.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language
Models", arXiv 2310.06927, section 3.4: the K operations of highest input kurtosis are skipped.
Per tensor, since activations are quantized per tensor. The largest magnitude, the range, and
measuring one operation at a time (exact, slow) are there to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from goldcrest.kernels.quantization.calibration import MinMax, Moments

Criterion = Literal["kurtosis", "max_abs", "range"]
"""What a ranking looks at: peakedness, largest magnitude, or width of the range."""


def rank(
    criterion: Criterion, moments: Mapping[str, Moments], ranges: Mapping[str, MinMax]
) -> list[str]:
    """Names of the operations, the most harmful to quantize first; ties by name.

    `moments` and `ranges` are those of each operation's input activation.
    Raises ValueError for an unknown criterion.
    """
    if criterion == "kurtosis":
        scores = {name: seen.kurtosis() for name, seen in moments.items()}
    elif criterion == "max_abs":
        scores = {name: seen.largest for name, seen in moments.items()}
    elif criterion == "range":
        scores = {name: seen.high - seen.low for name, seen in ranges.items()}
    else:
        raise ValueError(f"criterion must be kurtosis, max_abs or range, not '{criterion}'")
    return sorted(scores, key=lambda name: (-scores[name], name))


def rank_by_measurement(
    names: list[str], metric_with_one_quantized: Callable[[str], float]
) -> list[str]:
    """Names ordered by the task metric with only that operation quantized, worst first.

    The metric counts errors: higher is worse (EER, WER, perplexity). One evaluation per name.
    """
    scores = {name: metric_with_one_quantized(name) for name in names}
    return sorted(scores, key=lambda name: (-scores[name], name))


def to_skip(ranking: list[str], count: int) -> tuple[str, ...]:
    """The first `count` names. Raises ValueError for a negative count."""
    if count < 0:
        raise ValueError(f"the number of skipped operations must be at least 0, not {count}")
    return tuple(ranking[:count])

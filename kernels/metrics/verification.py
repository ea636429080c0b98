"""Error rates of speaker verification: DET curve, EER, minDCF, FA@10, confidence intervals.

Sources: the NIST speaker recognition evaluation plans (detection cost); A. Martin et al., "The DET
Curve in Assessment of Detection Task Performance", Eurospeech 1997; N. Poh, S. Bengio, "Estimating
the Confidence Interval of Expected Performance Curve in Biometric Authentication Using Joint
Bootstrap", ICASSP 2007 (resampling of speakers rather than trials).

A trial is accepted if its score is at or above the threshold t. Over the distinct scores and +inf:

    FRR(t) = share of target scores < t        FAR(t) = share of non-target scores >= t

Equal scores are one threshold. All rates are shares in [0, 1], not percent.

K trials   P thresholds   R bootstrap replicates   S speakers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from sklearn.metrics import roc_curve

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
EerMethod = Literal["interp", "roc_max", "kaldi"]


@dataclass(frozen=True, kw_only=True)
class DetCurve:
    """Error rates at rising thresholds; the last threshold is +inf (everything is refused)."""

    thresholds: FloatArray  # (P,) distinct scores, rising, then +inf
    frr: FloatArray  # (P,) false rejection rate, rises from 0 to 1
    far: FloatArray  # (P,) false acceptance rate, falls from 1 to 0

    def probit(self, floor: float = 1e-4) -> tuple[FloatArray, FloatArray]:
        """(far, frr) on the normal-deviate axes of a DET plot; rates are kept `floor` off 0, 1."""
        clip = (floor, 1 - floor)
        return ndtri(np.clip(self.far, *clip)), ndtri(np.clip(self.frr, *clip))


def check_trials(scores: ArrayLike, target: ArrayLike) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Scores (K,) float64 and labels (K,) bool, checked.

    Raises ValueError for lists of different lengths, labels other than 0 and 1, scores that are
    not finite, and a list without targets or without non-targets.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(target)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores and labels must be lists of one length, not {scores.shape}, {labels.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 1 (same speaker) or 0 (different speakers)")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite numbers")
    labels = labels.astype(bool)
    for kind, there in (("target", labels.any()), ("non-target", (~labels).any())):
        if not there:
            raise ValueError(
                f"the {len(labels)} trials hold no {kind} trial; error rates need both kinds"
            )
    return scores, labels


def det_curve(scores: ArrayLike, target: ArrayLike) -> DetCurve:
    """Error rates at every threshold that tells trials apart.

    Args:
        scores: (K,) higher means more likely the same speaker.
        target: (K,) 1 or True for the same speaker.

    Raises:
        ValueError: see `check_trials`.
    """
    values, labels = check_trials(scores, target)
    thresholds, which = np.unique(values, return_inverse=True)
    frr, far = _rates(
        np.bincount(which[labels], minlength=len(thresholds)).astype(np.float64),
        np.bincount(which[~labels], minlength=len(thresholds)).astype(np.float64),
    )
    return DetCurve(thresholds=np.append(thresholds, np.inf), frr=frr, far=far)


def _rates(targets: FloatArray, nontargets: FloatArray) -> tuple[FloatArray, FloatArray]:
    """FRR and FAR (..., P) from trial weights per distinct score (..., P-1)."""
    below = np.cumsum(targets, axis=-1)
    missed = np.concatenate([np.zeros_like(below[..., :1]), below], axis=-1)
    accepted = np.cumsum(nontargets[..., ::-1], axis=-1)[..., ::-1]
    accepted = np.concatenate([accepted, np.zeros_like(accepted[..., :1])], axis=-1)
    return missed / missed[..., -1:], accepted / accepted[..., :1]


def _interpolated_eer(frr: FloatArray, far: FloatArray) -> FloatArray:
    """EER of curves (..., P): where the line to the first FRR >= FAR crosses FRR = FAR."""
    gap = frr - far
    after = np.argmax(gap >= 0, axis=-1)[..., None]
    before = after - 1  # exists: the first point has FRR 0 and FAR 1
    rise = np.take_along_axis(gap, after, -1) - np.take_along_axis(gap, before, -1)
    share = -np.take_along_axis(gap, before, -1) / rise
    start = np.take_along_axis(frr, before, -1)
    return (start + share * (np.take_along_axis(frr, after, -1) - start))[..., 0]


def equal_error_rate(scores: ArrayLike, target: ArrayLike, method: EerMethod = "interp") -> float:
    """Equal error rate, in [0, 1].

    Methods, which differ on short lists: `interp`, linear between the two thresholds where FRR
    overtakes FAR; `roc_max`, the larger of the two rates where they are closest on scikit-learn's
    ROC curve; `kaldi`, the rank search of Kaldi's compute-eer.

    Raises:
        ValueError: see `check_trials`; an unknown method.
    """
    values, labels = check_trials(scores, target)
    if method == "interp":
        curve = det_curve(values, labels)
        return float(_interpolated_eer(curve.frr, curve.far))
    if method == "roc_max":
        far, accepted, _ = roc_curve(labels, values)
        closest = int(np.argmin(np.abs(1 - accepted - far)))
        return float(max(far[closest], 1 - accepted[closest]))
    if method == "kaldi":
        return _kaldi_eer(np.sort(values[labels]), np.sort(values[~labels]))
    raise ValueError(f"EER method '{method}' does not exist; there are: interp, roc_max, kaldi")


def _kaldi_eer(targets: FloatArray, nontargets: FloatArray) -> float:
    """Share of targets below the first whose own share of non-targets lies below it.

    With n of the N sorted targets below, the non-target that leaves the share n/N above itself is
    looked up; the first n where it scores below target n is the answer (the last n at the latest).
    """
    missed = np.arange(len(targets))
    above = missed * len(nontargets) // len(targets)
    rival = nontargets[np.maximum(len(nontargets) - 1 - above, 0)]
    found = np.flatnonzero(rival < targets)
    return float(found[0] if len(found) else len(targets) - 1) / len(targets)


def min_dcf(
    scores: ArrayLike,
    target: ArrayLike,
    p_target: float = 0.01,
    *,
    cost_miss: float = 1.0,
    cost_false_alarm: float = 1.0,
) -> float:
    """Least detection cost over thresholds, 1 for a system that always says the same.

    min_t [C_miss FRR(t) p + C_fa FAR(t) (1 - p)] / min(C_miss p, C_fa (1 - p))

    Raises:
        ValueError: see `check_trials`; `p_target` outside (0, 1) or a cost not above 0.
    """
    if not 0 < p_target < 1 or cost_miss <= 0 or cost_false_alarm <= 0:
        raise ValueError("p_target must be in (0, 1) and both costs above 0")
    curve = det_curve(scores, target)
    miss, alarm = cost_miss * p_target, cost_false_alarm * (1 - p_target)
    return float((miss * curve.frr + alarm * curve.far).min() / min(miss, alarm))


def far_at_frr(scores: ArrayLike, target: ArrayLike, frr: float = 0.10) -> float:
    """Least FAR among thresholds with FRR <= `frr`; with 0.10 it is FA@10.

    Raises ValueError as `check_trials` does.
    """
    curve = det_curve(scores, target)
    # A share such as 3/30 must not fail the limit 0.1 by a rounding error.
    return float(curve.far[curve.frr <= frr + 1e-12].min())


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of an error rate, and how it was resampled."""

    low: float
    high: float
    level: float  # coverage, such as 0.95
    unit: Literal["speaker", "trial"]  # what was drawn with replacement
    replicates: int  # replicates that held both kinds of trials


def bootstrap_eer(
    scores: ArrayLike,
    target: ArrayLike,
    speakers: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    block_bytes: int = 64 << 20,
) -> Interval:
    """Percentile bootstrap interval of the interpolated EER.

    By speaker if `speakers` gives the two speakers of every trial: speakers are drawn with
    replacement, a non-target trial counts as often as both its speakers together (product), a
    target trial as often as its one. Trials of one speaker are correlated, so this interval is the
    honest one; without `speakers` trials are drawn, targets and non-targets apart, and the
    interval is too narrow wherever speakers repeat.

    Args:
        scores: (K,) scores.
        target: (K,) 1 or True for the same speaker.
        speakers: two lists (K,) of names, of the first and of the second utterance.
        replicates: R, number of resampled lists.
        level: share of the distribution inside the interval.
        seed: seed of the resampling.
        block_bytes: memory of one block of replicates; changes nothing in the result.

    Raises:
        ValueError: see `check_trials`; also where no replicate holds both kinds of trials.
    """
    values, labels = check_trials(scores, target)
    if replicates < 1 or not 0 < level < 1:
        raise ValueError("replicates must be at least 1 and level in (0, 1)")
    # A stream per kind of trial, so that the size of a block does not change what is drawn.
    rng, other_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    order = np.argsort(values, kind="stable")
    values, labels = values[order], labels[order]
    first_of_tie = np.flatnonzero(np.append(True, np.diff(values) > 0))
    sides = None
    if speakers is not None:
        names = np.concatenate([np.asarray(side, dtype=str)[order] for side in speakers])
        count = len(np.unique(names))
        sides = np.unique(names, return_inverse=True)[1].reshape(2, -1)
    step = max(1, block_bytes // (8 * 6 * len(values)))
    eers: list[FloatArray] = []
    for done in range(0, replicates, step):
        rows = min(step, replicates - done)
        if sides is None:
            weights = np.empty((rows, len(labels)))
            for kind, stream in ((labels, rng), (~labels, other_rng)):
                weights[:, kind] = _counts(int(kind.sum()), rows, stream)
        else:
            drawn = _counts(count, rows, rng)
            weights = drawn[:, sides[0]] * np.where(labels, 1.0, drawn[:, sides[1]])
        targets = np.add.reduceat(weights * labels, first_of_tie, axis=1)
        nontargets = np.add.reduceat(weights * ~labels, first_of_tie, axis=1)
        usable = (targets.sum(axis=1) > 0) & (nontargets.sum(axis=1) > 0)
        eers.append(_interpolated_eer(*_rates(targets[usable], nontargets[usable])))
    pooled = np.concatenate(eers)
    if len(pooled) == 0:
        raise ValueError("no bootstrap replicate held both kinds of trials: too few speakers")
    low, high = np.quantile(pooled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        low=float(low),
        high=float(high),
        level=level,
        unit="trial" if sides is None else "speaker",
        replicates=len(pooled),
    )


def _counts(size: int, rows: int, rng: np.random.Generator) -> FloatArray:
    """How often each of `size` things is drawn in `size` draws with replacement: (rows, size)."""
    drawn = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)

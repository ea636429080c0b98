"""Learning-rate schedules, as pure functions of the optimizer step.

A schedule that is a function of the step alone has no state: a resumed run asks for the rate of
step k and gets the one that an undisturbed run would have had.

Shapes after `warmup_steps` of linear warm-up, with t from 0 to 1 over the remaining steps:
    constant     peak
    linear       peak + t (final - peak)
    cosine       final + (peak - final) (1 + cos(pi t)) / 2       [Loshchilov & Hutter 2017, eq. 5]
    exponential  peak * decay^e, e whole epochs since the warm-up
    onecycle     cosine up from peak / 25 during the warm-up (30 % of all steps if none is given),
                 cosine down to final                             [Smith & Topin 2018]
"""

from __future__ import annotations

import math

from goldcrest.cluster.training_config import TrainingConfig

ONECYCLE_START_DIVISOR = 25.0
ONECYCLE_WARMUP_SHARE = 0.3


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` at share 0 to `end` at share 1 along half a cosine."""
    return end + (start - end) * (1.0 + math.cos(math.pi * share)) / 2.0


def _onecycle(config: TrainingConfig, step: int, total: int) -> float:
    """The one-cycle rate; the phases end at the same steps as in torch's OneCycleLR."""
    peak, final = config.learning_rate, config.final_learning_rate
    top = float(config.warmup_steps or ONECYCLE_WARMUP_SHARE * total) - 1.0
    if step <= top:
        return _cosine(peak / ONECYCLE_START_DIVISOR, peak, step / top if top > 0 else 1.0)
    return _cosine(peak, final, min(1.0, (step - top) / max(total - 1.0 - top, 1e-9)))


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the whole run."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "onecycle":
        return _onecycle(config, step, total)
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(total - warmup, 1))
    if config.schedule == "linear":
        return peak + share * (final - peak)
    if config.schedule == "cosine":
        return _cosine(peak, final, share)
    if config.schedule == "exponential":
        return peak * config.decay ** ((step - warmup) // steps_per_epoch)
    return peak

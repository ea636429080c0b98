"""Which points a sweep tries, and which trials it gives up early: search and scheduler.

    search     random   points drawn from the space, known from the seed before anything starts
               grid     all combinations of the listed values
               optuna   points proposed by Optuna (TPE) from the finished trials
    scheduler  fifo     every trial runs to its end
               asha     asynchronous successive halving (Li et al. 2020): a trial goes on past rung
                        grace * reduction^k only if it is in the best 1/reduction there
               pbt      truncation and exploration of population based training (Jaderberg et al.
                        2017), see below

What `pbt` means here. In the paper a lagging worker copies the *weights* of a better one and goes
on from there with perturbed hyperparameters. A result of this project is addressed by the config
that made it, so weights that were trained under another config may not stand under its key. Here a
trial in the worst quarter is stopped, and a new trial starts whose config is a perturbed copy of
one of the best quarter. It trains from its own beginning; what it shares with the other trials is
every step before the first one that the perturbed fields touch, which comes from the store.

Decisions on the way need a curve (`sweep_trial.Watch`). A curve that is only replayed from the
store teaches the scheduler but stops nobody: that work has been paid for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from goldcrest.cluster.sweep_plan import SchedulerName, SweepOptions
from goldcrest.cluster.sweep_record import Replay
from goldcrest.cluster.sweep_space import Axis, Space, Values

QUARTER = 0.25
"""Share of the population that PBT stops, and that it copies."""
RESAMPLE = 0.25
"""Probability that PBT draws a field anew instead of perturbing it."""
FACTORS = (0.8, 1.2)
"""What PBT multiplies a number by."""
LEAST_POPULATION = 4
_ENDLESS = 10**9  # ASHA's max_t: trials end by themselves


# ---------------------------------------------------------------------------------- the search


class Points(Searcher):
    """Hands out the points of a sweep, numbered from 0, as `{"number", "values"}`.

    `recorded` are the points of an earlier attempt; they come first, in their order. The scores of
    those that were stopped then are in `replays`, by number.
    """

    def __init__(
        self,
        count: int,
        recorded: list[Values],
        replays: Mapping[int, Replay],
    ) -> None:
        super().__init__(metric="objective", mode="max")
        self.count, self.recorded, self.replays = count, recorded, replays
        self.given: list[Values] = []

    def suggest(self, trial_id: str) -> Any:
        """The config of the next trial, FINISHED after the last one."""
        number = len(self.given)
        values = self.propose(number, trial_id) if number < self.count else None
        if values is None:
            return Searcher.FINISHED
        self.given.append(values)
        config: dict[str, Any] = {"number": number, "values": values}
        replay = self.replays.get(number)
        if replay is not None and replay.values == values:
            config["replay"] = replay.scores
        return config

    def propose(self, number: int, trial_id: str) -> Values | None:
        """The point of this number, None where there is no more; all are known here."""
        return self.recorded[number] if number < len(self.recorded) else None

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """A row of a curve: nothing to learn for a search."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The end of a trial: nothing to learn for a list."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a repeated sweep goes on from its own record, never from Tune's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""


class OptunaPoints(Points):
    """Points proposed by Optuna; a recorded point is proposed again first."""

    def __init__(
        self,
        count: int,
        recorded: list[Values],
        replays: Mapping[int, Replay],
        *,
        space: Space,
        seed: int,
    ) -> None:
        super().__init__(count, recorded, replays)
        self.space = space
        self.optuna = OptunaSearch(
            OptunaSearch.convert_search_space(
                {path: axis.domain() for path, axis in space.axes.items()}
            ),
            metric="objective",
            mode="max",
            seed=seed,
            points_to_evaluate=[space.encode(values) for values in recorded],
        )

    def propose(self, number: int, trial_id: str) -> Values | None:
        """Optuna's next point."""
        codes = self.optuna.suggest(trial_id)
        return self.space.decode(codes) if codes else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Optuna learns from ends only: curves are on another scale than the goal."""
        self.optuna.on_trial_complete(trial_id, result, error)


class Population(Points):
    """The exploring half of PBT: perturbed copies of the best, once the first ones are drawn."""

    def __init__(
        self,
        count: int,
        recorded: list[Values],
        replays: Mapping[int, Replay],
        *,
        space: Space,
        seed: int,
        population: int,
    ) -> None:
        super().__init__(count, recorded, replays)
        self.space, self.seed = space, seed
        self.first = space.random_points(max(LEAST_POPULATION, population), seed)
        self.standing: dict[str, tuple[float, float]] = {}  # trial -> (rows, score)
        self.values: dict[str, Values] = {}

    def propose(self, number: int, trial_id: str) -> Values | None:
        """A recorded point, a drawn one for the first population, or a perturbed copy."""
        rng = np.random.default_rng((self.seed, number))
        if number < len(self.recorded):
            values = self.recorded[number]
        elif number < len(self.first):
            values = self.first[number]
        elif not self.standing:
            values = self.space.draw(self.seed, number)
        else:
            best = sorted(self.standing, key=self.standing.__getitem__, reverse=True)
            best = best[: max(1, math.ceil(QUARTER * len(best)))]
            values = perturb(self.values[best[int(rng.integers(len(best)))]], self.space, rng)
        self.values[trial_id] = values
        return values

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Who got further stands higher, among equals the better score."""
        if "score" in result:
            self.standing[trial_id] = (float(result["rows"]), float(result["score"]))

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A finished trial stands above all that were stopped, by its metric."""
        if result and "objective" in result:
            self.standing[trial_id] = (math.inf, float(result["objective"]))


def perturb(values: Values, space: Space, rng: np.random.Generator) -> Values:
    """A copy of a point with every field moved: drawn anew, to a neighbour, or by a factor."""
    made = {}
    for path, axis in space.axes.items():
        if rng.random() < RESAMPLE:
            made[path] = axis.decode(axis.domain().sample(random_state=rng))
        else:
            made[path] = _moved(axis, values[path], rng)
    return made


def _moved(axis: Axis, value: Any, rng: np.random.Generator) -> Any:
    up = bool(rng.integers(2))
    if axis.listed:
        place = int(axis.encode(value)) + (1 if up else -1)
        return axis.listed[min(max(place, 0), len(axis.listed) - 1)]
    low, high = axis.ends()
    moved = value * FACTORS[up]
    if axis.randint and round(moved) == value:
        moved = value + (1 if up else -1)  # a factor moves small whole numbers nowhere
    return axis.decode(min(max(round(moved) if axis.randint else moved, low), high))


def make_search(
    options: SweepOptions,
    space: Space,
    points: list[Values],
    recorded: list[Values],
    replays: Mapping[int, Replay],
) -> Points:
    """The search of a sweep.

    `points` are those known beforehand, `recorded` those of earlier attempts, `replays` the stopped
    ones among them.
    """
    if points:
        return Points(len(points), points, replays)
    count = options.trials or len(recorded)
    recorded = recorded[:count]
    if options.scheduler == "pbt":
        return Population(
            count,
            recorded,
            replays,
            space=space,
            seed=options.seed,
            population=options.parallel or LEAST_POPULATION,
        )
    return OptunaPoints(count, recorded, replays, space=space, seed=options.seed)


# ------------------------------------------------------------------------------- the schedulers


class Halving(ASHAScheduler):
    """Tune's ASHA over the rows of the watched curve."""

    def __init__(self, *, grace: int, reduction: float) -> None:
        super().__init__(
            time_attr="rows",
            metric="score",
            mode="max",
            max_t=_ENDLESS,
            grace_period=grace,
            reduction_factor=reduction,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """ASHA's decision, unless the row is only replayed."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get("replayed") else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The end is no row: all rows are known already."""
        self._trial_info.pop(trial.trial_id, None)


class Truncation(FIFOScheduler):
    """The stopping half of PBT: at every `interval` rows the worst quarter of those seen there."""

    def __init__(self, *, interval: int) -> None:
        super().__init__()
        self.interval = interval
        self.scores: dict[int, list[float]] = {}  # rows -> scores of the trials that got there

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """STOP for a score in the lowest quarter, once enough trials have come this far."""
        rows = int(result.get("rows", 0))
        if not rows or rows % self.interval:
            return TrialScheduler.CONTINUE
        seen = self.scores.setdefault(rows, [])
        seen.append(float(result["score"]))
        enough = len(seen) >= LEAST_POPULATION and not result.get("replayed")
        worst = enough and seen[-1] < float(np.quantile(seen, QUARTER))
        return TrialScheduler.STOP if worst else TrialScheduler.CONTINUE


def make_scheduler(name: SchedulerName, *, grace: int, reduction: float) -> Any:
    """The scheduler of a sweep; `grace` rows pass before the first decision."""
    if name == "asha":
        return Halving(grace=grace, reduction=reduction)
    return Truncation(interval=grace) if name == "pbt" else FIFOScheduler()

"""Which points a search proposes, and whom a scheduler stops; without any trial running.

The schedulers are Tune's interface, called as Tune calls it; expected decisions are worked out by
hand from the rules in the module's docstring.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.sweep_plan import SweepOptions, plan_sweep
from goldcrest.cluster.sweep_record import Replay
from goldcrest.cluster.sweep_search import Population, make_scheduler, make_search, perturb
from goldcrest.cluster.sweep_space import Space
from goldcrest.cluster.sweep_trial import Goal, Watch
from tests.cluster import sweep_toys

SPACE = Space.parse(
    {
        "learn.rate": {"uniform": [0.1, 1.0]},
        "learn.depth": {"randint": [1, 9]},
        "learn.kind": {"choice": ["plain", "b", "c", "d"]},
    }
)
METRIC = "verification.dense.eer"
CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def options(**more: Any) -> SweepOptions:
    return SweepOptions(metric=METRIC, **more)


def test_known_points_come_in_order_and_stopped_ones_are_replayed() -> None:
    points = SPACE.random_points(3, 0)
    replays = {
        1: Replay(values=points[1], scores=[(1, -1.0), (2, -0.5)]),
        2: Replay(values=points[0], scores=[(1, -9.0)]),  # of a space that was another
    }
    search = make_search(options(trials=3), SPACE, points, [], replays)
    assert search.suggest("a") == {"number": 0, "values": points[0]}
    assert search.suggest("b") == {
        "number": 1,
        "values": points[1],
        "replay": [(1, -1.0), (2, -0.5)],
    }
    assert search.suggest("c") == {"number": 2, "values": points[2]}
    assert search.suggest("d") == Searcher.FINISHED


def test_optuna_repeats_recorded_points_and_learns_from_ends_only() -> None:
    recorded = SPACE.random_points(2, 7)
    wanted = options(trials=12, search="optuna")
    search = make_search(wanted, SPACE, [], recorded, {})
    proposed = []
    for number in range(12):
        trial = f"t{number}"
        values = search.suggest(trial)["values"]
        proposed.append(values)
        search.on_trial_result(trial, {"rows": 1, "score": -5.0})  # a curve is not the goal
        if number % 3 == 2:  # stopped by a scheduler: no objective
            search.on_trial_complete(trial, {"rows": 1, "score": -5.0})
        else:
            objective = -((values["learn.rate"] - 0.3) ** 2)
            search.on_trial_complete(trial, {"objective": objective, "done": True})
    assert proposed[:2] == recorded
    assert search.suggest("end") == Searcher.FINISHED
    for values in proposed:
        assert 0.1 <= values["learn.rate"] <= 1.0
        assert values["learn.depth"] in range(1, 9)
        assert values["learn.kind"] in ("plain", "b", "c", "d")
    trials = search.optuna._ot_study.trials  # type: ignore[attr-defined]
    told = [trial.value for trial in trials if trial.value is not None]
    assert len(told) == 8
    assert all(value > -1 for value in told)


def test_a_perturbed_point_is_a_neighbour_inside_the_space() -> None:
    start = {"learn.rate": 0.5, "learn.depth": 1, "learn.kind": "c"}
    rng = np.random.default_rng(0)
    seen = [perturb(start, SPACE, rng) for _ in range(400)]
    rates = [point["learn.rate"] for point in seen]
    factors = {0.4, 0.6}
    assert 0.6 < sum(rate in factors for rate in rates) / 400 < 0.9  # a quarter is drawn anew
    assert all(0.1 <= rate <= 1.0 for rate in rates)
    kinds = [point["learn.kind"] for point in seen]
    assert set(kinds) == {"plain", "b", "c", "d"}
    assert kinds.count("b") > kinds.count("c")
    assert {point["learn.depth"] for point in seen} == set(range(1, 9))
    low = [point["learn.depth"] for point in seen].count(1)
    assert low > 100  # 0.8 and 1.2 move a 1 nowhere, so it goes to 2, or stays at the end
    edge = {"learn.rate": 1.0, "learn.depth": 8, "learn.kind": "d"}
    assert all(perturb(edge, SPACE, rng)["learn.rate"] <= 1.0 for _ in range(50))


def test_a_population_copies_who_got_furthest() -> None:
    search = make_search(options(trials=40, scheduler="pbt", parallel=2), SPACE, [], [], {})
    assert isinstance(search, Population)
    first = [search.suggest(f"t{n}")["values"] for n in range(4)]
    assert first == SPACE.random_points(4, 0)
    search.on_trial_result("t0", {"rows": 1, "score": 5.0})
    search.on_trial_result("t1", {"rows": 3, "score": -5.0})
    search.on_trial_complete("t2", {"objective": -0.1})
    search.on_trial_complete("t3", {"rows": 2})  # stopped: what it told before counts
    copies = [search.suggest(f"u{n}")["values"] for n in range(30)]
    rate = first[2]["learn.rate"]
    near = [SPACE.axes["learn.rate"].decode(rate * factor) for factor in (0.8, 1.2)]
    near = [min(max(value, 0.1), 1.0) for value in near]
    close = sum(
        any(math.isclose(c["learn.rate"], value, rel_tol=1e-4) for value in near) for c in copies
    )
    assert close > 15


def test_asha_stops_the_worse_and_nobody_for_a_replay() -> None:
    scheduler = make_scheduler("asha", grace=2, reduction=2)
    trials = {name: SimpleNamespace(trial_id=name) for name in "abcd"}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)

    def row(name: str, rows: int, score: float, **more: Any) -> str:
        result = {"rows": rows, "score": score, **more}
        return scheduler.on_trial_result(None, trials[name], result)

    assert scheduler.on_trial_result(None, trials["a"], {"steps": {}}) == CONTINUE
    assert row("a", 1, -9.0) == CONTINUE  # before the grace
    assert row("a", 2, -1.0) == CONTINUE  # the first one there
    assert row("b", 2, -2.0, replayed=True) == CONTINUE
    assert row("c", 2, -3.0) == STOP
    assert row("d", 2, -0.5) == CONTINUE
    scheduler.on_trial_complete(None, trials["d"], {"objective": -0.5})


def test_pbt_stops_the_worst_quarter_at_each_look() -> None:
    scheduler = make_scheduler("pbt", grace=2, reduction=3)

    def row(rows: int, score: float, **more: Any) -> str:
        return scheduler.on_trial_result(None, None, {"rows": rows, "score": score, **more})

    assert [row(2, score) for score in (-1.0, -2.0, -3.0)] == [CONTINUE] * 3
    assert row(3, -99.0) == CONTINUE  # no look between
    assert row(2, -4.0) == STOP
    assert row(2, -2.5) == CONTINUE
    assert row(2, -9.0, replayed=True) == CONTINUE
    assert row(4, -9.0) == CONTINUE  # too few have come here


def test_what_is_watched() -> None:
    goal = Goal(metric="clustering.cimc.nmi", mode="max")
    chosen = Watch(goal=goal)
    assert chosen.score("any", {"nmi": 0.4, "loss": 3.0}) == 0.4  # the metric's own word
    assert chosen.score("any", {"loss": 3.0}) == -3.0
    assert chosen.score("any", {"epoch": 1.0}) is None
    assert chosen.score("any", {"loss": math.inf}) is None
    asked = Watch(steps=("train",), name="accuracy", mode="max", goal=goal)
    assert asked.score("train", {"accuracy": 0.5, "nmi": 1.0}) == 0.5
    assert asked.score("other", {"accuracy": 0.5}) is None
    assert goal.value({"clustering": {"cimc": {"nmi": 1}}}) == 1.0
    assert goal.value({"clustering": {"cimc": {"nmi": None}}}) is None
    assert goal.value({"clustering": {"cimc": {"nmi": True}}}) is None


def test_a_plan_knows_what_trials_share_and_which_curve_tells() -> None:
    plan = plan_sweep(sweep_toys, {}, SPACE, options(trials=5))
    assert plan.touched == ["learn", "measure"]
    assert plan.watched == ("learn",)
    assert plan.name.startswith("sweep-sweep_toys-")
    longer = plan_sweep(sweep_toys, {}, SPACE, options(trials=9, parallel=2))
    assert longer.name == plan.name  # goes on
    assert plan_sweep(sweep_toys, {}, SPACE, options(trials=5, seed=1)).name != plan.name
    named = plan_sweep(sweep_toys, {}, SPACE, options(trials=5, watch="prefix.loss"))
    assert named.watched == ("prefix",)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "how many trials"),
        ({"search": "grid"}, "a grid needs lists"),
        ({"trials": 2, "scheduler": "pbt", "search": "optuna"}, "pbt proposes its own points"),
        ({"trials": 2, "watch": "nothing.loss"}, "there is no step 'nothing'"),
    ],
)
def test_wrong_options_are_refused_in_words(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_sweep(sweep_toys, {}, SPACE, options(**more))


def test_optuna_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else real(name, *a)
    )
    with pytest.raises(InputError, match="Optuna, which is not installed") as refused:
        plan_sweep(sweep_toys, {}, SPACE, options(trials=2, search="optuna"))
    assert "goldcrest[sweep]" in (refused.value.hint or "")


def test_rows_are_counted_by_epoch_so_that_a_resumed_training_is_compared_rightly() -> None:
    import queue

    from goldcrest.cluster.events import StepLog
    from goldcrest.cluster.sweep_trial import _Reporter

    def told(steps: tuple[str, ...], epochs: list[float]) -> list[int]:
        heard: queue.Queue[dict[str, Any]] = queue.Queue()
        watch = Watch(steps=steps, goal=Goal(metric=METRIC))
        reporter = _Reporter(watch, heard)
        for index, epoch in enumerate(epochs):
            row = {"epoch": epoch, "loss": 1.0}
            reporter.on_event(StepLog(run_id="r", step="train", index=index, row=row))
        return [heard.get()["rows"] for _ in range(heard.qsize())]

    assert told(("train",), [0, 1, 2]) == [1, 2, 3]
    assert told(("train",), [5, 6]) == [6, 7]  # goes on from a checkpoint
    assert told(("train",), [0, 1, 1, 2]) == [1, 2, 3]  # an epoch told again after a lost worker
    assert told((), [0, 1, 0, 1]) == [1, 2, 3, 4]  # two steps, one after the other
    assert told(("other",), [0, 1]) == []

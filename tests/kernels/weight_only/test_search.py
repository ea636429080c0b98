"""The search for a recipe, on metrics made up for each test: nothing is quantized here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldcrest.kernels.weight_only import methods
from goldcrest.kernels.weight_only.grid import GridSettings
from goldcrest.kernels.weight_only.search import (
    EFFORT,
    Recipe,
    Rule,
    Trial,
    ordered,
    read_bits,
    search,
    sparing,
    stored_bits,
)


def recipe(method: str = "rtn", size: int = 32, scheme: str = "asym") -> Recipe:
    return Recipe(method=method, grid=GridSettings(group_size=size, scheme=scheme))


class Trials:
    """Gives the metrics in turn and counts what was asked for, what was run and what was ended."""

    def __init__(self, metrics: Sequence[float], *, ahead: int = 1) -> None:
        self.metrics, self.ahead = list(metrics), ahead
        self.started = self.taken = 0
        self.closed = 0

    def __call__(self, recipes: Sequence[Recipe]) -> Iterator[Trial]:
        try:
            for place in range(len(recipes)):
                self.started = max(self.started, self.taken + min(self.ahead, len(recipes) - place))
                metric = self.metrics[self.taken]
                self.taken += 1
                yield Trial(metric=metric, size=1000 - self.taken)
        finally:
            self.closed += 1


RECIPES = [recipe(size=size) for size in (128, 64, 32)]


def test_stops_at_the_first_that_passes() -> None:
    """Perplexity 10 -> 10.1 is 1 % (property 5)."""
    trials = Trials([10.2, 10.1, 10.0])
    found = search(RECIPES, trials, Rule(baseline=10.0, higher_is_better=False))
    assert found.passed
    assert found.recipe == RECIPES[1]
    assert len(found.tried) == trials.taken == 2
    assert trials.closed == 1


def test_a_metric_that_is_better_when_higher() -> None:
    found = search(RECIPES, Trials([0.49, 0.497, 0.5]), Rule(baseline=0.5, higher_is_better=True))
    assert found.recipe == RECIPES[1]
    rule = Rule(baseline=0.5, higher_is_better=True)
    assert rule.loss(0.49) == pytest.approx(0.02)
    assert rule.loss(0.51) == pytest.approx(-0.02)
    assert Rule(baseline=-2.0, higher_is_better=True).loss(-2.1) == pytest.approx(0.05)


def test_respects_max_trials_and_returns_the_best() -> None:
    trials = Trials([12.0, 11.0, 10.0])
    rule = Rule(baseline=10.0, higher_is_better=False, max_trials=2)
    found = search(RECIPES, trials, rule, spare=lambda best: [recipe("gptq")])
    assert trials.taken == 2
    assert not found.passed
    assert found.recipe == RECIPES[1]


def test_equal_losses_go_to_the_smaller_model() -> None:
    found = search(RECIPES, Trials([12.0, 11.0, 11.0]), Rule(baseline=10.0, higher_is_better=False))
    assert found.chosen == 2


def test_a_broken_model_never_wins() -> None:
    rule = Rule(baseline=10.0, higher_is_better=False)
    found = search(RECIPES, Trials([math.nan, 20.0, math.inf]), rule)
    assert found.recipe == RECIPES[1]
    asked: list[Recipe] = []
    search(RECIPES, Trials([math.nan] * 3), rule, spare=lambda best: asked.append(best) or [])
    assert not asked  # sparing layers does not mend what is broken everywhere


def test_spares_layers_of_the_best_when_nothing_passes() -> None:
    asked: list[Recipe] = []
    spared = [recipe("gptq"), recipe("awq"), recipe("teq")]

    def spare(best: Recipe) -> list[Recipe]:
        asked.append(best)
        return spared

    trials = Trials([12.0, 11.0, 13.0, 10.5, 10.05, 10.0])
    found = search(RECIPES, trials, Rule(baseline=10.0, higher_is_better=False), spare)
    assert asked == [RECIPES[1]]
    assert found.passed
    assert found.recipe == spared[1]
    assert trials.taken == 5


@given(st.lists(st.floats(9, 12), min_size=3, max_size=3), st.integers(1, 3))
def test_the_result_does_not_depend_on_how_many_run_ahead(metrics: list[float], ahead: int) -> None:
    rule = Rule(baseline=10.0, higher_is_better=False)
    assert search(RECIPES, Trials(metrics, ahead=ahead), rule) == search(
        RECIPES, Trials(metrics), rule
    )


def test_orders_by_size_then_effort() -> None:
    recipes = [recipe(method, size) for size in (32, 128, -1) for method in ("autoround", "rtn")]
    names = [each.name for each in ordered(recipes, "size")]
    assert names[:3] == ["rtn per row asym", "autoround per row asym", "rtn g128 asym"]
    assert ordered(recipes, "accuracy")[0].name == "rtn g32 asym"
    assert ordered([recipe(scheme="asym"), recipe(scheme="sym")], "size")[0].grid.scheme == "sym"
    assert set(EFFORT) == set(methods())


def test_latency_counts_what_the_operator_reads() -> None:
    """Above 256 a group is several of the operator's; other bits are decoded to float first."""
    assert (
        read_bits(GridSettings(group_size=1024)) == read_bits(GridSettings(group_size=256)) == 4.125
    )
    assert read_bits(GridSettings(group_size=32)) == 5.0
    assert read_bits(GridSettings(group_size=256, bits=3)) > 32
    same = [recipe("awq", 1024), recipe("rtn", 256), recipe("rtn", 32)]
    assert ordered(same, "latency")[0].name == "rtn g256 asym"
    assert stored_bits(GridSettings(group_size=128)) == 4 + 36 / 128
    assert stored_bits(GridSettings(group_size=128, scheme="sym", scale_dtype="float16")) == 4.125


def test_sparing_adds_the_fewest_bytes_first() -> None:
    errors = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.3}
    weights = dict.fromkeys(errors, 100)
    variants = sparing(recipe(), errors, weights, 3)
    assert [(v.eight_bits, v.high_precision) for v in variants] == [
        (("b",), ()),
        (("b", "c"), ()),
        (("b", "c", "d"), ()),
        ((), ("b",)),
        ((), ("b", "c")),
        ((), ("b", "c", "d")),
    ]
    assert variants[1].name == "rtn g32 asym + 2 at 8 bits"
    assert sparing(recipe(), {}, {}, 3) == []


def test_records_are_plain_json() -> None:
    record = json.loads(json.dumps(recipe("gptq", -1).record()))
    assert record["algorithm"] == "gptq"
    assert record["group_size"] == -1
    assert {"bits", "scheme", "scale_dtype", "algorithm_settings", "high_precision"} <= set(record)


def test_searches_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="no recipes"):
        search([], Trials([]), Rule(baseline=1.0, higher_is_better=True))
    for baseline in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="the float model's metric is"):
            Rule(baseline=baseline, higher_is_better=True)
    with pytest.raises(ValueError, match="at least one trial"):
        Rule(baseline=1.0, higher_is_better=True, max_trials=0)

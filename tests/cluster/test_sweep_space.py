"""Spaces of sweeps: what a file may say, what is refused in words, which points are drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.sweep_space import Space
from tests.cluster import sweep_toys

RATE = {"learn.rate": {"loguniform": [0.01, 1.0]}}
FULL: dict[str, Any] = {
    **RATE,
    "learn.depth": {"randint": [1, 5]},
    "learn.kind": {"choice": ["plain", {"a": 1}, None]},
    "prefix.speakers": {"grid": [2, 3]},
}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "has no axes"),
        ({"learn.rate": 3}, "must say what it varies over, not 3"),
        ({"learn.rate": {"unifrom": [0, 1]}}, "did you mean 'uniform'?"),
        ({"learn.rate": {"uniform": [0, 1], "grid": [1]}}, "give exactly one of"),
        ({"learn.rate": {"also": ["x"]}}, "give exactly one of"),
        ({"learn.rate": {"uniform": [1, 1]}}, "first bound must be below the second"),
        ({"learn.rate": {"uniform": [0]}}, "uniform"),
        ({"learn.rate": {"loguniform": [0, 1]}}, "bounds above 0, not 0"),
        ({"learn.rate": {"randint": [1.5, 3]}}, "randint"),
        ({"learn.rate": {"choice": []}}, "at least one value"),
        ({"learn.rate": {"choice": [1, 2, 1]}}, "given twice"),
        ({"learn.rate": {"grid": [1], "also": ["learn.rate"]}}, "'learn.rate' is on two axes"),
        ({f"a{i}": {"grid": [1]} for i in range(65)}, "at most 64"),
    ],
)
def test_wrong_spaces_are_refused_in_words(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="the space") as refused:
        Space.parse(tree)
    assert words in refused.value.message


def test_a_space_is_checked_against_the_config_class() -> None:
    Space.parse(FULL).check(sweep_toys.Config, {}, [])
    for tree, words in (
        ({"learn.rte": {"uniform": [1, 2]}}, "did you mean 'learn.rate'?"),
        ({"learn.rate": {"uniform": [0, 1]}}, "'learn.rate' at 0.0"),
        ({"learn.rate": {"uniform": [1, 99]}}, "less than or equal to 10"),
        ({"learn.depth": {"uniform": [1, 2.5]}}, "valid integer"),
        ({"learn.depth": {"choice": [1, "deep"]}}, "'learn.depth' at 'deep'"),
        ({**RATE, "learn.rate.x": {"grid": [1]}}, "learn.rate"),
    ):
        with pytest.raises(InputError) as refused:
            Space.parse(tree).check(sweep_toys.Config, {}, [])
        assert words in refused.value.message


def test_a_value_reaches_all_its_fields_and_leaves_the_base_alone() -> None:
    space = Space.parse({"learn.depth": {"grid": [1, 2], "also": ["prefix.speakers"]}})
    base = {"learn": {"rate": 0.5}}
    config = space.configure(sweep_toys.Config, base, {"learn.depth": 2}, where="here")
    assert (config.learn.depth, config.prefix.speakers, config.learn.rate) == (2, 2, 0.5)
    assert base == {"learn": {"rate": 0.5}}


def test_random_points_depend_on_seed_and_number_alone() -> None:
    space = Space.parse(FULL)
    points = space.random_points(20, seed=3)
    assert space.random_points(50, seed=3)[:20] == points
    assert space.random_points(20, seed=4) != points
    assert {point["learn.depth"] for point in points} == {1, 2, 3, 4}
    rates = [point["learn.rate"] for point in points]
    assert all(0.01 <= rate <= 1.0 for rate in rates)
    assert 4 < sum(rate < 0.1 for rate in rates) < 16  # half of them, drawn over the logarithm


def test_a_small_space_gives_every_point_once() -> None:
    space = Space.parse({"a": {"grid": [1, 2]}, "b": {"choice": ["x", "y", None]}})
    points = space.random_points(100, seed=0)
    assert len(points) == 6
    grid = space.grid_points(None)
    assert grid[:3] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": None}]
    assert sorted(map(str, grid)) == sorted(map(str, points))
    assert space.grid_points(4) == grid[:4]
    with pytest.raises(InputError, match=r"'learn\.rate' is a range, and a grid needs lists"):
        Space.parse(FULL).grid_points(None)


def test_the_last_points_of_a_space_are_found_too() -> None:
    space = Space.parse({"a": {"choice": list(range(16))}, "b": {"choice": [1, 2, 3, 4]}})
    for seed in range(10):
        assert len(space.random_points(64, seed=seed)) == 64


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("learn.rate: {loguniform: [1e-4, 1e-2]}\n")
    assert Space.load(path).axes["learn.rate"].loguniform == (1e-4, 1e-2)
    path.write_text("learn.rate: !!python/name:os.system\n")
    with pytest.raises(InputError, match="tags"):
        Space.load(path)


numbers = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(numbers, min_size=2, max_size=2, unique=True), st.floats(0, 1))
def test_a_drawn_number_is_short_and_inside(bounds: list[float], share: float) -> None:
    low, high = sorted(bounds)
    axis = Space.parse({"x": {"uniform": [low, high]}}).axes["x"]
    code = min(max(low + share * (high - low), low), high)
    value = axis.decode(code)
    assert low <= value <= high
    assert math.isclose(value, code, rel_tol=1e-5, abs_tol=1e-5 * max(abs(low), abs(high)))
    assert axis.decode(axis.encode(value)) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=12,
    )
)
@settings(max_examples=200)
def test_anything_else_is_an_input_error(value: Any) -> None:
    for tree in ({"x": value}, {"x": {"uniform": value}}, {"x": {"choice": value}}, value):
        if isinstance(tree, dict):
            try:
                space = Space.parse(tree)
            except InputError:
                continue
            assert space.axes

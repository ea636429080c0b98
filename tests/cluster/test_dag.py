"""Binding tasks into a Ray DAG and walking it: names, order, keys, resources, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.api import InputError
from goldcrest.cluster.dag import Step, walk
from goldcrest.cluster.keys import Fingerprints
from tests.cluster.engine_steps import (
    Chain,
    ChainConfig,
    FilesConfig,
    NumberConfig,
    add,
    number,
    read_files,
    total,
)

ONE = NumberConfig(value=1)


def steps_of(
    built: Any, overrides: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> dict[str, Step]:
    walked = walk(built, fingerprints=Fingerprints(Path("/nowhere/cache")), overrides=overrides)
    return {step.name: step for step in walked}


def test_a_node_is_a_ray_dag_node_and_ray_is_not_started() -> None:
    import ray
    from ray.dag import FunctionNode

    running = ray.is_initialized()
    assert isinstance(number.bind(ONE), FunctionNode)
    assert ray.is_initialized() == running


def test_steps_come_inputs_first_and_a_shared_node_comes_once() -> None:
    first = number.bind(ONE)
    left, right = add.bind(ONE, first, name="left"), add.bind(ONE, first, name="right")
    steps = steps_of([add.bind(ONE, left, right, name="end"), left])
    assert list(steps) == ["number", "left", "right", "end"]
    assert steps["end"].inputs == {"left": "left", "right": "right"}
    assert steps["left"].inputs == {"left": "number", "right": None}
    assert steps["end"].input_keys["left"] == steps["left"].key
    assert steps["left"].key == steps["right"].key  # the same work under two names


def test_a_long_chain_needs_no_recursion() -> None:
    assert len(steps_of(Chain.build(ChainConfig(length=1500)))) == 1501


def test_a_change_reaches_every_step_below_and_no_other() -> None:
    def keys(value: int) -> dict[str, str]:
        source = number.bind(NumberConfig(value=value), name="source")
        other = number.bind(ONE, name="other")
        end = add.bind(ONE, source, other, name="end")
        return {name: step.key for name, step in steps_of(end).items()}

    before, after = keys(1), keys(2)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"source", "end"}


def test_key_changes_with_seed_and_input_place_but_not_with_name_or_neutral_field() -> None:
    def key(node: Any) -> str:
        return list(steps_of(node).values())[-1].key

    base = key(number.bind(ONE))
    assert key(number.bind(ONE, name="other")) == base
    assert key(number.bind(NumberConfig(value=1, seconds=9.0))) == base
    assert key(number.bind(ONE, resources={"cpus": 2})) == base
    assert key(number.bind(ONE, seed=1)) != base
    a, b = number.bind(ONE, name="a"), number.bind(NumberConfig(value=2), name="b")
    assert key(add.bind(ONE, a, b)) != key(add.bind(ONE, b, a))


def test_resources_come_from_the_decorator_the_binding_and_the_profile() -> None:
    node = number.bind(ONE, name="pretrain", resources={"memory": 10, "gpus": 1})
    overrides = [("pre*", {"gpus": 2.0}), ("other", {"cpus": 8})]
    resources = steps_of(node, overrides)["pretrain"].resources
    assert (resources.cpus, resources.gpus, resources.memory) == (0.5, 2.0, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: add.bind(ONE), TypeError, "add: input 'left' is missing"),
        (lambda: add.bind(ONE, 3), TypeError, "input 'left' is a int"),
        (lambda: add.bind(ONE, middle=None), TypeError, "unexpected input 'middle'"),
        (lambda: number.bind(ONE, None), TypeError, "takes 0 inputs"),
        (lambda: number.bind(FilesConfig()), TypeError, "takes a NumberConfig, not a FilesConfig"),
        (lambda: number.bind(ONE, resources={"cpu": 1}), InputError, "'cpu' is no resource"),
        (lambda: number.bind(ONE, resources={"cpus": -1}), InputError, "at least 0, not -1"),
    ],
)
def test_wrong_bindings_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_task_may_take_further_inputs_by_name() -> None:
    one, two = number.bind(ONE), number.bind(NumberConfig(value=2), name="two")
    end = steps_of(total.bind(ONE, one, b=two, a=one))["total"]
    assert end.inputs == {"first": "number", "b": "two", "a": "number"}
    assert end.key == steps_of(total.bind(ONE, one, a=one, b=two))["total"].key
    assert end.key != steps_of(total.bind(ONE, one, a=two, b=one))["total"].key
    assert end.key != steps_of(total.bind(ONE, one, b=two))["total"].key
    with pytest.raises(TypeError, match="further input 'b' is None"):
        total.bind(ONE, one, b=None)


def test_two_steps_of_one_name_are_refused() -> None:
    end = add.bind(ONE, number.bind(ONE), number.bind(NumberConfig(value=2)))
    with pytest.raises(InputError, match=r"called 'number' .*number\.bind\(\.\.\., name="):
        steps_of(end)


@pytest.mark.parametrize("built", [None, [], "a node", [number.bind(ONE), None]])
def test_a_build_without_nodes_is_refused(built: Any) -> None:
    with pytest.raises(InputError, match="must return a bound task"):
        steps_of(built)


def test_missing_input_files_name_step_and_field() -> None:
    with pytest.raises(InputError, match="step 'read_files': corpus: there is no file"):
        steps_of(read_files.bind(FilesConfig(corpus="/nowhere/corpus")))

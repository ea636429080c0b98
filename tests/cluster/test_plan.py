"""The plan says which steps run and why, in words; expected sentences are those of the design."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from goldcrest.cluster import plan as plan_module
from goldcrest.cluster.dag import walk
from goldcrest.cluster.keys import Fingerprints
from goldcrest.cluster.plan import NEVER_RAN, SOURCE_CHANGED, Plan, make_plan
from goldcrest.cluster.store import Store
from tests.cluster.engine_steps import FilesConfig, NumberConfig, add, number, read_files


def pipeline(build: Any) -> Any:
    return SimpleNamespace(build=build, __name__="goldcrest.pipelines.example")


def two_steps(first: NumberConfig, second: NumberConfig, seed: int = 0) -> Any:
    return add.bind(second, number.bind(first, seed=seed))


def put(store: Store, built: Any, **changes: Any) -> None:
    """Put an artifact with a plausible manifest into the store for every step of `built`."""
    for step in walk(built, fingerprints=Fingerprints(Path("/nowhere/c"))):
        manifest: Mapping[str, Any] = {
            "schema": 1,
            "task": step.task_name,
            "version": step.task.version,
            "step": step.name,
            "created": "2026-11-21T02:03:00.000+00:00",
            "seconds": 1.0,
            "config": step.canonical,
            "seed": step.seed,
            "inputs": dict(step.input_keys),
            "metrics": {},
            "measurements": {},
            "run": "the-run",
            **changes,
        }
        with store.lease(step.key, owner="test") as lease:
            folder = store.begin(step.key, lease)
            (folder / "number.json").write_text("1\n", encoding="utf-8")
            store.commit(step.key, folder, manifest, lease)


def plan(store: Store, built: Any) -> Plan:
    return make_plan(
        pipeline(lambda _: built), None, store, fingerprints=Fingerprints(Path("/nowhere/c"))
    )


def reasons(store: Store, built: Any) -> dict[str, str]:
    return {p.step.name: f"{p.state}: {p.reason}" for p in plan(store, built).steps}


@pytest.fixture
def store(store_folder: Path) -> Store:
    return Store.open(store_folder)


ONE, TWO = NumberConfig(value=1), NumberConfig(value=2)


def test_an_empty_store_never_ran_anything(store: Store) -> None:
    assert reasons(store, two_steps(ONE, ONE)) == {
        "number": f"run: {NEVER_RAN}",
        "add": f"run: {NEVER_RAN}",
    }


def test_everything_there_is_cached(store: Store) -> None:
    put(store, two_steps(ONE, ONE))
    states = {p.step.name: p.state for p in plan(store, two_steps(ONE, ONE)).steps}
    assert states == {"number": "cached", "add": "cached"}
    assert "in run the-run" in reasons(store, two_steps(ONE, ONE))["add"]


def test_a_changed_field_is_named_and_what_follows_runs_because_of_it(store: Store) -> None:
    put(store, two_steps(ONE, ONE))
    assert reasons(store, two_steps(TWO, ONE)) == {
        "number": "run: config `value` changed 1 -> 2",
        "add": "run: upstream `number` will run",
    }


def test_the_nearest_earlier_result_is_compared(store: Store) -> None:
    put(store, two_steps(NumberConfig(value=5), ONE), created="2026-11-20")
    put(store, two_steps(NumberConfig(value=7), TWO), created="2026-11-21")
    found = reasons(store, two_steps(NumberConfig(value=5), NumberConfig(value=9)))
    assert found["add"] == "run: config `value` changed 1 -> 9"


def test_an_upstream_that_is_cached_under_another_key_is_a_changed_input(store: Store) -> None:
    put(store, two_steps(ONE, ONE))
    put(store, number.bind(TWO))
    assert reasons(store, two_steps(TWO, ONE))["add"] == "run: input `left` changed"


def test_seed_and_version_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, two_steps(ONE, ONE))
    assert reasons(store, two_steps(ONE, ONE, seed=3))["number"] == "run: seed changed 0 -> 3"
    monkeypatch.setattr(number, "version", 2)
    assert reasons(store, two_steps(ONE, ONE))["number"] == "run: version changed 1 -> 2"


def test_changed_input_files_are_named(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "corpus" / "a.wav"
    file.parent.mkdir()
    file.write_text("one", encoding="utf-8")
    config = FilesConfig(corpus=str(file.parent))
    put(store, read_files.bind(config))
    assert reasons(store, read_files.bind(config))["read_files"].startswith("cached")
    file.write_text("two", encoding="utf-8")
    found = reasons(store, read_files.bind(config))
    assert found == {"read_files": "run: input files of `corpus` changed"}


def test_a_flipped_bit_is_damage_and_only_that_step_runs(store: Store) -> None:
    built = two_steps(ONE, ONE)
    put(store, built)
    first = plan(store, built).steps[0].artifact
    assert first is not None
    member = first.path / "number.json"
    member.chmod(0o644)
    member.write_bytes(b"3\n")
    found = reasons(Store.open(store.uri), built)
    assert found["number"].startswith("run: damaged: ")
    assert found["add"].startswith("cached")


def test_source_changes_without_a_new_version_are_noticed(store: Store) -> None:
    put(store, number.bind(ONE), source="0" * 64)
    planned = plan(store, number.bind(ONE)).steps[0]
    assert (planned.state, planned.notice) == ("cached", SOURCE_CHANGED)
    put(store, number.bind(TWO), source=plan_module.source_hash(number.function.__module__))
    assert plan(store, number.bind(TWO)).steps[0].notice == ""


def test_many_changes_are_cut_short() -> None:
    assert plan_module._short("x" * 100).endswith("...")
    before = {"version": 1, "config": {f"f{i}": 0 for i in range(6)}, "seed": 0, "inputs": {}}
    step = walk(number.bind(ONE), fingerprints=Fingerprints(Path("/nowhere/c")))[0]
    text = plan_module._why(step, before, {})
    assert text.endswith("; and 4 more")
    assert text.startswith("config `value` changed (not there) -> 1")


def test_the_table_and_its_json(store: Store) -> None:
    put(store, number.bind(ONE))
    made = plan(store, two_steps(ONE, ONE))
    lines = made.text().splitlines()
    assert lines[0].split() == ["step", "state", "why"]
    assert re.match(r"number +cached +made 2026-11-21", lines[1])
    assert lines[2:] == ["add     run     never ran", "1 of 2 steps will run"]
    assert made.as_json()["pipeline"] == "example"
    assert made.as_json()["steps"][1]["inputs"] == {"left": "number", "right": None}


def test_mermaid_draws_every_step_and_edge_and_escapes(store: Store) -> None:
    text = plan(store, add.bind(ONE, number.bind(ONE, name='say "hi"'))).mermaid()
    assert text.splitlines()[0] == "flowchart LR"
    assert 's0["say #quot;hi#quot;<br/>run: never ran"]:::run' in text
    assert 's0 -- "left" --> s1' in text
    assert text.count("-->") == 1

"""Held-out prompts: one side for all rows of a prompt, whatever the order and the shares."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.tasks.language.examples import Split
from goldcrest.tasks.language.splits import EvaluationRows, HoldOut, Item, place_of

prompts = st.lists(st.sampled_from([f"p{n}" for n in range(12)]), min_size=1, max_size=60)
shares = st.floats(0, 0.45)


def sides(items: list[Item], wanted: dict[Split, float], seed: int = 0) -> list[tuple[Split, Item]]:
    hold_out = HoldOut(wanted, seed)
    found = [each for item in items for each in hold_out.place(item)]
    return [*found, *hold_out.close()]


@given(prompts, shares, shares, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_no_row_is_lost_and_no_prompt_is_on_two_sides(
    names: list[str], test: float, validation: float, seed: int
) -> None:
    items = [Item(str(number), name, "a") for number, name in enumerate(names)]
    found = sides(items, {"test": test, "validation": validation}, seed)
    assert sorted(item.id for _, item in found) == sorted(item.id for item in items)
    of_prompt: dict[str, set[str]] = {}
    for split, item in found:
        of_prompt.setdefault(item.prompt, set()).add(split)
    assert all(len(each) == 1 for each in of_prompt.values())
    used = {split for split, _ in found}
    if len(of_prompt) >= 12 and min(test, validation) > 0.01:
        assert used == {"train", "validation", "test"}
    if test == validation == 0:
        assert used == {"train"}


@given(st.permutations([f"p{n}" for n in range(9)]))
@settings(max_examples=20, deadline=None)
def test_sides_do_not_depend_on_the_order(names: list[str]) -> None:
    def of(order: list[str]) -> dict[str, str]:
        found = sides([Item(name, name, "a") for name in order], {"test": 0.1, "validation": 0.1})
        return {item.prompt: split for split, item in found}

    assert of(names) == of(sorted(names))


def test_shares_are_met_and_seeds_differ() -> None:
    items = [Item(str(n), f"prompt {n}", "a") for n in range(4000)]
    found = sides(items, {"test": 0.1, "validation": 0.2})
    counts = {split: sum(each == split for each, _ in found) for split in ("test", "validation")}
    # A binomial of 4000: standard deviations of 19 and 25.
    assert abs(counts["test"] - 400) < 100
    assert abs(counts["validation"] - 800) < 130
    assert place_of(b"key", 0) != place_of(b"key", 1)


def test_one_prompt_of_many_rows_is_not_kept_in_memory_and_stays_on_one_side() -> None:
    other = [Item("other", "another", "a")]
    many = [Item(str(n), "always the same", str(n)) for n in range(10_050)]
    hold_out = HoldOut({"test": 1e-9, "validation": 1e-9}, 0)
    found = [each for item in [*other, *many, *other] for each in hold_out.place(item)]
    assert len(found) == 10_052
    assert {split for split, _ in [*found, *hold_out.close()]} == {"train"}


def test_references_are_brought_together_and_the_first_split_keeps_a_prompt(tmp_path: Path) -> None:
    with EvaluationRows(tmp_path / "rows.sqlite") as rows:
        assert rows.add("test", Item("1", "p", "a"))
        assert rows.add("test", Item("2", "q", "x"))
        assert rows.add("test", Item("3", "p", "b"))
        assert rows.add("test", Item("4", "p", "a"))
        assert not rows.add("validation", Item("5", "q", "y"))
        assert rows.add("validation", Item("6", "", "plain"))
        assert rows.split_of(Item("7", "p", "z").key) == "test"
        assert rows.split_of(Item("8", "new", "z").key) is None
        found = [(e.id, e.prompt, e.answer, e.references) for e in rows.examples("test")]
        assert found == [("1", "p", "a", ("a", "b")), ("2", "q", "x", ("x",))]
        assert [e.references for e in rows.examples("validation")] == [()]
    with EvaluationRows(tmp_path / "rows.sqlite") as rows:
        assert list(rows.examples("test")) == []

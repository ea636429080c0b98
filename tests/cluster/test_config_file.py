"""Configuration files: what is read, what is refused, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator

from goldcrest.cluster.api import Config
from goldcrest.cluster.config_file import (
    describe_fields,
    difference,
    load_config,
    parse_override,
    parse_yaml,
    to_yaml,
)
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.training_config import TrainingConfig


class Method(Config):
    """A group of fields with a free-form mapping in it."""

    method: str = "cimc"
    settings: dict[str, Any] = Field(default_factory=dict)
    mu: float = Field(3.5, gt=0, description="weight of the balance term")


class Whole(Config):
    """A pipeline's config."""

    clustering: Method = Method()
    second: Method | None = None
    mode: Literal["fast", "exact"] = "exact"
    hub_token: int = 0
    sizes: tuple[int, ...] = (1, 2)
    seed: int = Field(0, ge=0, description="seed")

    @field_validator("sizes")
    @classmethod
    def _not_empty(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("give at least one size")
        return value


class Chosen(Config):
    """A pipeline that has chosen other values for its groups than their classes have."""

    clustering: Method = Method(method="ahc", mu=2.0)
    whole: Whole = Whole(clustering=Method(mu=7.0), seed=3)
    training: TrainingConfig | None = TrainingConfig(epochs=80, batch_size=200)
    either: Method | Whole = Method(mu=9.0)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_group_that_is_given_in_part_keeps_the_pipeline_s_other_choices(tmp_path: Path) -> None:
    text = "clustering: {mu: 5}\nwhole: {clustering: {method: cpc}, sizes: [4]}"
    found = load_config(Chosen, file=write(tmp_path, text), overrides=["training.epochs=3"])
    assert found.clustering == Method(method="ahc", mu=5.0)
    assert found.whole == Whole(clustering=Method(method="cpc", mu=7.0), seed=3, sizes=(4,))
    assert found.training == TrainingConfig(epochs=3, batch_size=200)
    # A value that was given stands, also where it is that of the class; so does a group's absence.
    again = load_config(Chosen, overrides=["clustering.method=cimc", "training=null"])
    assert again.clustering == Method(method="cimc", mu=2.0)
    assert again.training is None
    # Of several classes the given values choose one: another's default has no part in it.
    assert load_config(Chosen, overrides=["either.seed=1"]).either == Whole(seed=1)
    assert load_config(Chosen, overrides=["either.method=x"]).either == Method(method="x")


def test_what_is_wrong_in_such_a_group_is_named() -> None:
    with pytest.raises(InputError, match=r"no field 'whole\.clustering\.muu'"):
        load_config(Chosen, overrides=["whole.clustering.muu=5"])
    with pytest.raises(InputError, match=r"field 'whole\.clustering\.mu' .*-1"):
        load_config(Chosen, overrides=["whole.clustering.mu=-1"])


@given(st.sets(st.sampled_from(["epochs", "batch_size", "learning_rate", "schedule"])))
def test_what_is_shown_of_a_config_gives_the_same_config(changed: set[str]) -> None:
    values = {"epochs": 5, "batch_size": 7, "learning_rate": 0.5, "schedule": "cosine"}
    group = {name: values[name] for name in sorted(changed)}
    config = Chosen.model_validate({"training": group})
    standing = {"epochs": 80, "batch_size": 200}
    assert config.training == TrainingConfig(**(standing | group))  # type: ignore[arg-type]
    assert Chosen.model_validate(config.model_dump()) == config
    text = to_yaml(config.model_dump(mode="json"))
    assert Chosen.model_validate(parse_yaml(text, where="here")) == config


# Expected values: the core schema of YAML 1.2 (section 10.3.2 of its specification), in which
# only true/false are booleans and 1e-3 is a number; PyYAML's own YAML 1.1 rules differ in each.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("2026-11-21", "2026-11-21"),
        ("'7'", "7"),
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, where="here")
    assert found == value
    assert type(found) is type(value)


def test_file_then_options_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "clustering: {mu: 2, settings: {epochs: 3}}\nseed: 1\n")
    config = load_config(
        Whole,
        file=path,
        fields={"seed": 5, "sizes": [4]},
        overrides=["clustering.settings.rate=1e-2", "seed=6", "second.mu=9"],
    )
    assert config.clustering.mu == 2.0
    assert config.clustering.settings == {"epochs": 3, "rate": 0.01}
    assert config.seed == 6
    assert config.sizes == (4,)
    assert config.second is not None
    assert config.second.mu == 9.0


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Whole, file=write(tmp_path, "# nothing\n")) == Whole()


def test_override_of_a_list_element() -> None:
    config = load_config(Whole, fields={"sizes": [1, 2, 3]}, overrides=["sizes.1=7"])
    assert config.sizes == (1, 7, 3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["clustring.mu=4"], "no field 'clustring'; did you mean 'clustering'?"),
        (["clustering.methd=x"], "did you mean 'clustering.method'? (fields of clustering: "),
        (["mu=3"], "did you mean 'clustering.mu' or 'second.mu'?"),
        (["clustering.mu=-1"], "'clustering.mu' should be greater than 0, not -1"),
        (["mode=quick"], "'mode' should be 'fast' or 'exact', not 'quick'"),
        (["seed=soon"], "'seed' should be a valid integer"),
        (["seed=1.5"], "'seed' should be a valid integer"),
        (["hub_token=hush"], "parse string as an integer, not ***"),
        (["clustering=3"], "'clustering' should be a group of fields, not 3"),
        (["sizes=[]"], "'sizes' is []: give at least one size"),
        (["clustering.mu=1e999"], "'clustering.mu' is inf; give a finite number"),
        (["clustering.settings.q=1e999"], "'clustering.settings.q' is inf"),
        (["seed.x=1", "seed=2", "seed.x=1"], "'seed' is a value and has no field 'x'"),
        (["seed"], "is not an override (write it as field.subfield=value)"),
        (["seed="], "gives no value (write seed=null or seed='')"),
        (["=3"], "is not an override"),
        (["a..b=3"], "is not an override"),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Whole, overrides=overrides)
    assert said in str(caught.value)


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: -1\nmode: x\nclustering: {mu: 0}\n")
    with pytest.raises(InputError) as caught:
        load_config(Whole, file=path)
    message = str(caught.value)
    assert "3 fields are wrong" in message
    assert str(path) in message
    assert all(name in message for name in ("'seed'", "'mode'", "'clustering.mu'"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "line 2, column 1: field 'seed' is given twice"),
        ("a: {b: 1, b: 2}\n", "field 'b' is given twice"),
        ("- 1\n- 2\n", "must hold fields (name: value), not a list"),
        ("1: 2\n", "field names must be plain text"),
        ("seed: [1\n", "line 2"),
        ("seed: 1\n--- \nseed: 2\n", "but found another document"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Whole, file=write(tmp_path, text))
    assert said in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no configuration file"):
        load_config(Whole, file=tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"mode: \xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(Whole, file=tmp_path / "latin.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(Whole, file=tmp_path)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
    | st.sampled_from(
        ["no", "1e3", "0x1F", "1:30", "~", "null", "<<", "=", "!x", "&a", "*a", "010"]
    )
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), trees, max_size=4))
def test_what_is_written_is_read_back(settings_tree: dict[str, Any]) -> None:
    config = Whole(clustering=Method(settings=settings_tree))
    text = to_yaml(config.model_dump(mode="json"))
    assert Whole.model_validate(parse_yaml(text, where="text")) == config


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_data_or_an_input_error(text: str) -> None:
    try:
        value = parse_yaml(text, where="fuzz")
    except InputError:
        return
    assert isinstance(value, str | int | float | list | dict | None)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_override_is_parsed_or_an_input_error(text: str) -> None:
    try:
        path, _ = parse_override(text)
    except InputError:
        return
    assert path
    assert all(path)


def test_difference_lists_only_what_differs() -> None:
    other = load_config(Whole, overrides=["clustering.mu=1", "clustering.settings.k=2"])
    assert difference(Whole(), other) == [
        ("clustering.settings", {}, "(absent)"),
        ("clustering.mu", 3.5, 1.0),
        ("clustering.settings.k", "(absent)", 2),
    ]


def test_every_leaf_field_is_described() -> None:
    rows = {row["field"]: row for row in describe_fields(Whole)}
    assert rows["clustering.mu"]["description"] == "weight of the balance term"
    assert rows["clustering.mu"]["default"] == "3.5"
    assert rows["mode"]["type"] == "'fast' | 'exact'"
    assert "second.mu" in rows

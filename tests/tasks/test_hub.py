"""References to Hugging Face datasets: taken apart, and told from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data import hub
from goldcrest.tasks.data.hub import DatasetReference, dataset_reference, load_splits, load_table


@pytest.mark.parametrize(
    ("path", "reference"),
    [
        ("datasets://squad", DatasetReference("squad")),
        ("datasets://openai/gsm8k", DatasetReference("openai/gsm8k")),
        (
            "datasets://openai/gsm8k/main:test",
            DatasetReference("openai/gsm8k", "main", None, "test"),
        ),
        ("datasets://a/b@v1.0", DatasetReference("a/b", None, "v1.0")),
        (
            "datasets://a/b/de-en@refs/pr/1:train",
            DatasetReference("a/b", "de-en", "refs/pr/1", "train"),
        ),
        ("datasets://a/b:train[:10%]", DatasetReference("a/b", split="train[:10%]")),
        ("/a/folder", None),
    ],
)
def test_a_reference_is_taken_apart(path: str, reference: DatasetReference | None) -> None:
    assert dataset_reference(path) == reference
    if reference is not None:
        assert f"datasets://{reference}" == path


def test_two_names_of_one_table_are_the_same(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a"]})
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "an@odd/name")
    (tmp_path / "link").symlink_to(tmp_path / "plain")

    def identity(path: Any) -> tuple[str, str]:
        reference = dataset_reference(str(path))
        assert reference is not None
        return reference.identity

    plain, odd = tmp_path / "plain", tmp_path / "an@odd/name"
    assert identity(plain) == identity(f"datasets://{plain}:test") == identity(tmp_path / "link")
    assert (
        identity(odd) == identity(f"datasets://{odd}:train") != identity(f"datasets://{odd}:test")
    )
    alike = ("datasets://a/b", "datasets://a/b/c", "datasets://a/b@1", "datasets://a/b:test")
    assert len({identity(path) for path in alike}) == 4
    assert identity("datasets://a/b") == identity("datasets://a/b:train")


def test_what_is_asked_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, config and revision go on as they are; tables are downloaded, splits are streamed."""
    import datasets

    asked: list[dict[str, Any]] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append({"name": name, "config": config, **options})
        raise FileNotFoundError("gated")

    monkeypatch.setattr(datasets, "load_dataset", load)
    reference = dataset_reference("datasets://a/b/hi@main:test")
    assert reference is not None
    same = {"name": "a/b", "config": "hi", "revision": "main"}
    with pytest.raises(InputError, match="dataset a/b/hi@main:test can't be loaded: gated"):
        load_table(reference)
    with pytest.raises(InputError, match="gated"):
        load_splits(reference)
    assert asked == [
        {**same, "split": "test", "streaming": False},
        {**same, "split": None, "streaming": True},
    ]


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "d")
    reference = dataset_reference(str(tmp_path / "d"))
    assert reference is not None
    with pytest.raises(InputError, match="no split 'train'") as error:
        load_table(reference)
    assert error.value.hint == "its splits are test"
    assert list(load_splits(reference)) == ["test"]
    assert hub.is_saved_dataset(tmp_path / "d")

"""Hugging Face datasets by reference: one of the hub, or one that was saved on disk.

    datasets://NAME[/CONFIG][@REVISION][:SPLIT]    e.g. datasets://openai/gsm8k/main:train
    datasets://FOLDER[:SPLIT], or just FOLDER      what `Dataset.save_to_disk` wrote

NAME is `owner/name`. A reference is part of an artifact's key as it is written, so REVISION (a
commit, a tag or a branch of the dataset's repository) is what pins the content that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldcrest.cluster.api import InputError

DATASETS_PREFIX = "datasets://"
_DICT_FILE = "dataset_dict.json"  # of what has splits
_SAVED_FILES = ("state.json", _DICT_FILE)  # what `save_to_disk` leaves


@dataclass(frozen=True)
class DatasetReference:
    """A reference, taken apart; `name` is a folder where the dataset is a saved one."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = ""

    @property
    def saved(self) -> bool:
        """Whether it is on disk."""
        return is_saved_dataset(Path(self.name))

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for two references to one table: a folder (links followed) or a name, a split."""
        if not self.saved:
            return f"{self.name}/{self.config or ''}@{self.revision or ''}", self.split or "train"
        folder = Path(self.name)
        has_splits = (folder / _DICT_FILE).is_file()  # what was saved as one table has none
        return str(folder.resolve()), (self.split or "train") if has_splits else ""

    def __str__(self) -> str:
        parts = (("", self.name), ("/", self.config), ("@", self.revision), (":", self.split))
        return "".join(f"{mark}{part}" for mark, part in parts if part)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in _SAVED_FILES)


def dataset_reference(path: str) -> DatasetReference | None:
    """The reference that a corpus' path is, None for one that is no dataset."""
    text = path.removeprefix(DATASETS_PREFIX)
    if text == path:
        folder = Path(path).expanduser()
        return DatasetReference(str(folder)) if is_saved_dataset(folder) else None
    place, _, split = text.partition(":")
    if is_saved_dataset(Path(place)):
        return DatasetReference(place, split=split)
    place, _, revision = place.partition("@")
    owner, _, rest = place.partition("/")
    name, _, config = rest.partition("/")
    return DatasetReference(f"{owner}/{name}".strip("/"), config or None, revision or None, split)


def load_splits(reference: DatasetReference) -> dict[str, Any]:
    """Every split, or the one that is asked for, as tables to read from the front.

    One of the hub is streamed: what is read of it is fetched as it is read, and nothing is kept
    on disk, so that the first rows of a large one cost no more than they are. What was saved as
    one table has no splits: it is called "". Raises InputError for what can't be loaded.
    """
    import datasets

    loaded = _load(reference, split=None, streaming=True)
    if not isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
        return {"": loaded}
    if not reference.split:
        return {name: loaded[name] for name in sorted(loaded)}
    return {reference.split: _split(loaded, reference, reference.split)}


def load_table(reference: DatasetReference) -> Any:
    """One split (default: train) as a table on disk whose rows can be read in any order.

    One of the hub is downloaded into the cache of `datasets`. Raises InputError for what can't be
    loaded.
    """
    import datasets

    split = reference.split or "train"
    loaded = _load(reference, split=split, streaming=False)
    return _split(loaded, reference, split) if isinstance(loaded, datasets.DatasetDict) else loaded


def _split(loaded: Any, reference: DatasetReference, split: str) -> Any:
    if split in loaded:
        return loaded[split]
    raise InputError(
        f"dataset {reference} can't be loaded: it has no split '{split}'",
        hint=f"its splits are {', '.join(sorted(loaded))}",
    )


def _load(reference: DatasetReference, *, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        if reference.saved:
            return datasets.load_from_disk(reference.name)
        return datasets.load_dataset(
            reference.name,
            reference.config,
            revision=reference.revision,
            split=split,
            streaming=streaming,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:  # a script in it
        raise InputError(f"dataset {reference} can't be loaded: {error}") from error

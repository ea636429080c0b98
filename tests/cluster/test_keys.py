"""Keys: what changes them, what does not; fingerprints of input files.

Expected values come from the definition in `cluster/keys.py`; there is no outside reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from goldcrest.cluster import keys
from goldcrest.cluster.api import Config, DoesNotChangeResult, InputError, InputFiles
from goldcrest.cluster.artifact import sha256_file
from goldcrest.cluster.keys import Fingerprints, canonical_config, digest, step_key
from goldcrest.cluster.markers import relative_to


class Colour(Enum):
    RED = "red"


class Inner(Config):
    size: float = 1.0
    threads: Annotated[int, DoesNotChangeResult] = 1


class Plain(BaseModel):
    epochs: int = 3


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()
    plain: Plain = Plain()
    folder: Path = Path("x/y")
    colour: Colour = Colour.RED
    sizes: tuple[int, ...] = (1, 2)
    tags: frozenset[str] = frozenset({"b", "a"})
    settings: dict[str, Any] = Field(default_factory=dict)
    threads: Annotated[int, DoesNotChangeResult] = 2


class Corpora(Config):
    corpus: Annotated[str | None, InputFiles] = None
    several: tuple[Annotated[str, InputFiles], ...] = ()
    optional: Annotated[str, InputFiles] | None = None


@pytest.fixture
def fingerprints(tmp_path: Path) -> Fingerprints:
    return Fingerprints(tmp_path / "cache.sqlite")


def key(config: dict[str, Any], **changes: Any) -> str:
    parts: dict[str, Any] = {
        "task": "m.t",
        "version": 1,
        "config": config,
        "inputs": {"a": "0" * 64, "b": None},
        "seed": 0,
    }
    return step_key(**{**parts, **changes})


def test_canonical_form_is_plain_and_leaves_out_what_changes_nothing(
    fingerprints: Fingerprints,
) -> None:
    assert canonical_config(Outer(), fingerprints) == {
        "name": "a",
        "inner": {"size": 1.0},
        "plain": {"epochs": 3},
        "folder": "x/y",
        "colour": "red",
        "sizes": [1, 2],
        "tags": ["a", "b"],
        "settings": {},
    }


def test_result_neutral_fields_do_not_change_the_form(fingerprints: Fingerprints) -> None:
    before = canonical_config(Outer(), fingerprints)
    assert canonical_config(Outer(threads=9, inner=Inner(threads=5)), fingerprints) == before
    assert canonical_config(Outer(inner=Inner(size=2.0)), fingerprints) != before


def test_every_part_of_a_key_changes_it() -> None:
    base = key({"x": 1})
    others = [
        key({"x": 2}),
        key({"y": 1}),
        key({"x": 1}, task="m.other"),
        key({"x": 1}, version=2),
        key({"x": 1}, seed=1),
        key({"x": 1}, seed=None),
        key({"x": 1}, inputs={"a": "1" * 64, "b": None}),
        key({"x": 1}, inputs={"a": None, "b": "0" * 64}),
    ]
    assert len({base, *others}) == len(others) + 1
    assert len(base) == 64


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False), max_size=5))
def test_order_of_a_mapping_does_not_matter(mapping: dict[str, Any]) -> None:
    finite = {k: v for k, v in mapping.items() if abs(v) < 1e300}
    backwards = dict(reversed(finite.items()))
    assert key(finite) == key(backwards)


def test_keys_are_the_same_in_another_process() -> None:
    """Hash randomisation must not leak into a key (sets, dict order)."""
    code = (
        "from pathlib import Path; import sys; sys.path.insert(0, '.');"
        "from tests.cluster.test_keys import Outer, key;"
        "from goldcrest.cluster.keys import Fingerprints, canonical_config;"
        "print(key(canonical_config(Outer(tags=frozenset('abcdef')), Fingerprints(Path('/x/y')))))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1


def test_minus_zero_equals_zero_and_nan_is_refused(fingerprints: Fingerprints) -> None:
    zero = canonical_config(Inner(size=0.0), fingerprints)
    assert digest(canonical_config(Inner(size=-0.0), fingerprints)) == digest(zero)
    with pytest.raises(InputError, match=r"inner\.size: nan"):
        canonical_config(Outer(inner=Inner(size=float("nan"))), fingerprints)


def test_a_value_without_a_plain_form_is_named(fingerprints: Fingerprints) -> None:
    with pytest.raises(InputError, match=r"settings\.f: a function has no plain form"):
        canonical_config(Outer(settings={"f": key}), fingerprints)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_place_and_hidden_files_do_not_count_names_and_bytes_do(
    tmp_path: Path, fingerprints: Fingerprints
) -> None:
    for place in ("here", "there"):
        write(tmp_path / place / "speaker1" / "a.wav", "sound")
    write(tmp_path / "there" / ".DS_Store", "noise")
    write(tmp_path / "renamed" / "speaker2" / "a.wav", "sound")
    write(tmp_path / "changed" / "speaker1" / "a.wav", "sounD")
    forms = {
        place: digest(canonical_config(Corpora(corpus=str(tmp_path / place)), fingerprints))
        for place in ("here", "there", "renamed", "changed")
    }
    assert forms["here"] == forms["there"]
    assert len(set(forms.values())) == 3


@pytest.mark.parametrize("field", ["corpus", "optional"])
def test_files_may_be_named_in_several_ways(
    tmp_path: Path, fingerprints: Fingerprints, field: str
) -> None:
    file = write(tmp_path / "a file", "text")
    one = canonical_config(Corpora(**{field: str(file)}), fingerprints)[field]
    uri = canonical_config(Corpora(**{field: file.as_uri()}), fingerprints)[field]
    several = canonical_config(Corpora(several=(str(file),)), fingerprints)["several"]
    assert one == uri == several[0]
    assert one["files"] == 1
    assert canonical_config(Corpora(), fingerprints)[field] is None


def test_relative_names_are_made_absolute_and_keep_their_key(
    tmp_path: Path, fingerprints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is made in the folder where they were typed, a worker opens them in its own."""
    file = write(tmp_path / "typed" / "trials.txt", "1 a b")
    monkeypatch.chdir(file.parent)
    typed = Corpora(corpus="trials.txt", several=("./trials.txt", "hf://a/b"), optional="../typed")
    assert typed.corpus == str(file)
    assert typed.several == (str(file), "hf://a/b")
    assert Corpora(corpus=file.as_uri()).corpus == str(file)
    monkeypatch.chdir(tmp_path)
    full = Corpora(corpus=str(file), several=(str(file), "hf://a/b"), optional=str(file.parent))
    assert canonical_config(typed, fingerprints) == canonical_config(full, fingerprints)
    with relative_to(file.parent):
        assert Corpora(corpus="trials.txt").corpus == str(file)
    assert Corpora(corpus="trials.txt").corpus == str(tmp_path / "trials.txt")


def test_a_link_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a folder is called may name a corpus, so it may not change with where it is typed."""
    write(tmp_path / "pack-v2" / "a.wav", "sound")
    (tmp_path / "pack").symlink_to(tmp_path / "pack-v2")
    monkeypatch.chdir(tmp_path)
    assert Corpora(corpus="pack").corpus == str(tmp_path / "pack")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.sampled_from(["~", "~nobody/x", "file://a%00b", "file:///x y"]))
def test_any_name_becomes_absolute_stays_or_is_refused(name: str) -> None:
    try:
        made = Corpora(corpus=name).corpus
    except ValidationError as error:
        assert "is not the name of a file" in str(error) or "~" in name
        return
    assert made == "" or "://" in made or Path(made).is_absolute()
    assert Corpora(corpus=made).corpus == made


def test_a_name_with_a_scheme_counts_as_its_name(fingerprints: Fingerprints) -> None:
    form = canonical_config(Corpora(corpus="hf://datasets/a/b"), fingerprints)
    assert form["corpus"] == {"name": "hf://datasets/a/b"}


def test_a_part_of_a_local_folder_counts_as_the_folder_s_content(
    tmp_path: Path, fingerprints: Fingerprints
) -> None:
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    for folder in (saved, copy):
        folder.mkdir()
        (folder / "data.arrow").write_text("one")
    of = fingerprints.of
    first = of(f"datasets://{saved}:test")
    assert first == of(f"datasets://{copy}:test")  # wherever it lies
    assert len({str(of(name)) for name in (f"datasets://{saved}", f"datasets://{saved}:test")}) == 2
    (copy / "data.arrow").write_text("two")
    assert Fingerprints(tmp_path / "new.sqlite").of(f"datasets://{copy}:test") != first
    assert of("datasets:///no/such/folder:test") == {"name": "datasets:///no/such/folder:test"}


def test_missing_and_empty_input_is_named(tmp_path: Path, fingerprints: Fingerprints) -> None:
    with pytest.raises(InputError, match=r"corpus: there is no file or folder '.*/nowhere'"):
        canonical_config(Corpora(corpus="nowhere"), fingerprints)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"several\[0\]: the folder .* holds no files"):
        canonical_config(Corpora(several=(str(tmp_path / "empty"),)), fingerprints)


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, fingerprints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root, who may run the tests, reads everything."""
    closed = write(tmp_path / "pack" / "b.wav", "sound")
    write(tmp_path / "pack" / "a.wav", "sound")

    def refuse(path: Path) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_file(path)

    monkeypatch.setattr(keys, "sha256_file", refuse)
    with pytest.raises(InputError, match=r"corpus: .*/pack/b\.wav can't be read: Permission"):
        canonical_config(Corpora(corpus=str(tmp_path / "pack")), fingerprints)
    with pytest.raises(InputError, match="File name too long"):
        canonical_config(Corpora(corpus="x" * 300), fingerprints)
    with pytest.raises(InputError, match="can't be the name of a file"):
        fingerprints.of("a\0b")


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    tmp_path: Path, fingerprints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "pack" / "anna" / "a.wav", "sound")
    write(tmp_path / "pack" / "bob" / "a.wav", "sound")
    plain = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("bob"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"corpus: .*/pack/bob can't be read: Permission denied"):
        canonical_config(Corpora(corpus=str(tmp_path / "pack")), fingerprints)


def settle(*paths: Path) -> None:
    """Wait until the files are old enough for their fingerprints to be remembered."""
    newest = max(path.stat().st_ctime for path in paths)
    time.sleep(max(0.0, newest + 2.2 - time.time()))


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path: Path) -> None:
    corpus, cache = tmp_path / "corpus", tmp_path / "cache.sqlite"
    files = [write(corpus / f"{i}.wav", "x" * 1000) for i in range(3)]
    settle(*files)
    first = Fingerprints(cache)
    before = first.of(corpus)
    assert first.hashed_bytes == 3000
    second = Fingerprints(cache)
    assert second.of(corpus) == before
    assert second.hashed_bytes == 0
    # Same size, same modification time: only the inode's own time tells.
    times = files[1].stat()
    files[1].write_text("y" * 1000, encoding="utf-8")
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    third = Fingerprints(cache)
    assert third.of(corpus) != before
    assert third.hashed_bytes == 1000


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    """Two changes within one tick of the clock leave one time stamp."""
    file = write(tmp_path / "a", "1")
    Fingerprints(tmp_path / "cache").of(file)
    again = Fingerprints(tmp_path / "cache")
    again.of(file)
    assert again.hashed_bytes == 1


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "") / "below" / "cache.sqlite"
    file = write(tmp_path / "a", "1")
    assert Fingerprints(blocked).of(file) == Fingerprints(tmp_path / "c").of(file)


def test_a_damaged_cache_only_costs_time(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache.sqlite", "this is no database, for certain not one" * 50)
    file = write(tmp_path / "a", "1")
    assert Fingerprints(cache).of(file) == Fingerprints(tmp_path / "c").of(file)


def test_restarts_and_checkpoints_do_not_enter_the_key_of_a_training() -> None:
    from goldcrest.cluster.training_config import TrainingConfig

    class Trains(Config):
        training: TrainingConfig = TrainingConfig()

    base = canonical_config(Trains(), Fingerprints())
    other = TrainingConfig(max_failures=9, checkpoint_every=7)
    assert canonical_config(Trains(training=other), Fingerprints()) == base
    longer = TrainingConfig(epochs=11)
    assert canonical_config(Trains(training=longer), Fingerprints()) != base

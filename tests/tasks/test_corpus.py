"""Corpus layouts, metadata that is wrong, and names that try to leave their folder."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.corpus import (
    corpus_name,
    read_corpora,
    read_corpus,
    refuse_shared_audio,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"RIFF")
    return root


def metadata(root: Path, *rows: object, name: str = "metadata.jsonl") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_a_folder_per_speaker(tmp_path: Path) -> None:
    root = touch(tmp_path / "pack", "anna/1.wav", "anna/deep/2.flac", "bob/1.ogg", "bob/notes.txt")
    found = read_corpora((str(root),))
    assert [(r.id, r.speaker) for r in found] == [
        ("pack/anna/1.wav", "anna"),
        ("pack/anna/deep/2.flac", "anna"),
        ("pack/bob/1.ogg", "bob"),
    ]


def test_a_file_in_two_corpora_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "pack", "anna/1.wav", "bob/1.wav")
    for inside in (root, root / "anna"):
        with pytest.raises(InputError, match="in two corpora"):
            read_corpora((str(root), str(inside)))


def test_links_are_followed_and_hidden_files_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.wav")
    root = touch(tmp_path / "pack", "bob/1.wav", "bob/._1.wav", ".cache/2.wav")
    (root / "anna").symlink_to(tmp_path / "elsewhere")
    assert [r.id for r in read_corpora((str(root),))] == ["pack/anna/1.wav", "pack/bob/1.wav"]


def test_a_name_that_is_not_utf8_stays_readable(tmp_path: Path) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.wav")).write_bytes(b"RIFF")
    assert [r.id for r in read_corpora((str(root),))] == ["pack/caf\\xe9.wav"]


def test_a_bare_folder_is_unlabelled(tmp_path: Path) -> None:
    root = touch(tmp_path / "bare", "1.wav", "later/2.wav")
    assert [r.speaker for r in read_corpora((str(root),))] == [None, None]


def test_the_layout_can_be_stated(tmp_path: Path) -> None:
    root = touch(tmp_path / "sessions", "monday/1.wav", "tuesday/1.wav")
    assert {r.speaker for r in read_corpora((str(root),), "bare")} == {None}


def test_metadata_names_speakers_and_absent_files(tmp_path: Path) -> None:
    root = metadata(
        tmp_path / "m",
        {"file_name": "a.wav", "speaker": "s1", "sex": "F", "text": "hi"},
        {"file_name": "gone.wav", "speaker": 7},
        {"file_name": "face.jpg"},
    )
    touch(root, "a.wav")
    found = read_corpora((str(root),))
    assert [(r.speaker, r.sex, r.text) for r in found] == [("s1", "F", "hi"), ("7", None, None)]
    assert found[0].problem is None
    assert "metadata.jsonl:2" in (found[1].problem or "")


def test_csv_metadata(tmp_path: Path) -> None:
    root = touch(tmp_path / "c", "a.wav")
    (root / "metadata.csv").write_text("file_name,speaker\na.wav,ann\n")
    assert [r.speaker for r in read_corpora((str(root),))] == ["ann"]


def test_parquet_metadata(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = touch(tmp_path / "p", "a.wav")
    pq.write_table(
        pa.table({"file_name": ["a.wav"], "speaker": ["ann"]}), root / "metadata.parquet"
    )
    assert [r.speaker for r in read_corpora((str(root),))] == ["ann"]


def test_a_manifest_file_is_a_corpus(tmp_path: Path) -> None:
    root = touch(tmp_path / "m", "a.wav")
    metadata(root, {"file_name": "a.wav"}, name="train.jsonl")
    assert len(read_corpora((str(root / "train.jsonl"),))) == 1


def test_two_corpora_of_one_name_stay_apart(tmp_path: Path) -> None:
    one, two = touch(tmp_path / "x" / "pack", "a.wav"), touch(tmp_path / "y" / "pack", "a.wav")
    found = read_corpora((str(one), str(two)))
    assert [r.id for r in found] == ["pack/a.wav", "pack-2/a.wav"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "a.wav"', "metadata.jsonl:1: not a line of UTF-8 JSON"),
        ("[1, 2]", "a JSON object was expected"),
        ({"speaker": "s"}, "no 'file_name'"),
        ({"file_name": "../../etc/passwd.wav"}, "lies outside"),
        ({"file_name": "/etc/passwd.wav"}, "lies outside"),
        ({"file_name": "a.wav", "speaker": ["s"]}, "field 'speaker' is list"),
        ("[" * 100_000, "not a line of UTF-8 JSON"),
        ('{"file_name": ' + "9" * 5_000 + "}", "not a line of UTF-8 JSON"),
        ({"file_name": "a.wav", "speaker": "\ud800"}, "field 'speaker' holds half a surrogate"),
    ],
)
def test_wrong_metadata_names_file_and_line(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        read_corpora((str(metadata(tmp_path / "w", row)),))


def test_a_file_listed_twice_is_refused(tmp_path: Path) -> None:
    root = touch(metadata(tmp_path / "d", {"file_name": "a.wav"}, {"file_name": "a.wav"}), "a.wav")
    with pytest.raises(InputError, match="listed twice"):
        read_corpora((str(root),))


def test_an_endless_line_is_refused(tmp_path: Path) -> None:
    root = metadata(tmp_path / "long", '{"file_name": "' + "x" * (1 << 20) + '"}')
    with pytest.raises(InputError, match="longer than"):
        read_corpora((str(root),))


def test_invalid_utf8_is_named(tmp_path: Path) -> None:
    root = tmp_path / "u"
    root.mkdir()
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.wav"}\n')
    with pytest.raises(InputError, match=r"metadata.jsonl:1"):
        read_corpora((str(root),))


def test_a_symlink_out_of_the_corpus_is_refused(tmp_path: Path) -> None:
    secret = touch(tmp_path, "secret.wav") / "secret.wav"
    root = metadata(tmp_path / "s", {"file_name": "link.wav"})
    (root / "link.wav").symlink_to(secret)
    with pytest.raises(InputError, match="lies outside"):
        read_corpora((str(root),))


def test_missing_and_empty_corpora(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_corpora((str(tmp_path / "nowhere"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no audio"):
        read_corpora((str(tmp_path / "empty"),))


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    sound = tmp_path / "a.wav"
    soundfile.write(sound, [0.1] * 1600, 16_000)
    table = datasets.Dataset.from_dict(
        {"audio": [{"bytes": sound.read_bytes(), "path": "a.wav"}], "speaker": ["ann"]}
    )
    table.save_to_disk(str(tmp_path / "saved"))
    (found,) = read_corpora((str(tmp_path / "saved"),))
    assert found.speaker == "ann"
    assert found.source() == sound.read_bytes()
    assert not isinstance(found.data, bytes)  # it stays in its table until it is asked for
    assert found.in_memory().data == sound.read_bytes()


def saved_dataset(folder: Path, *contents: bytes) -> str:
    import datasets

    rows = [{"bytes": data, "path": f"{number}.wav"} for number, data in enumerate(contents)]
    datasets.Dataset.from_dict({"audio": rows}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("other", ["same", "link", "prefixed", "a split of what has none"])
def test_a_saved_dataset_in_two_corpora_is_refused(tmp_path: Path, other: str) -> None:
    saved = saved_dataset(tmp_path / "saved", b"RIFF")
    (tmp_path / "link").symlink_to(saved)
    second = {
        "same": saved,
        "link": str(tmp_path / "link"),
        "prefixed": f"datasets://{saved}",
        "a split of what has none": f"datasets://{saved}:test",
    }[other]
    with pytest.raises(InputError, match="in two corpora") as error:
        read_corpora((saved, second))
    assert f"also given as {saved}" in error.value.message


def test_a_dataset_of_the_hub_in_two_corpora_is_refused() -> None:
    with pytest.raises(InputError, match="org/x:train is in two corpora"):
        read_corpora(("datasets://org/x", "datasets://org/x:train"))
    with pytest.raises(InputError, match="can't be loaded"):  # another split is another corpus
        read_corpora(("datasets://no/x:test", "datasets://no/x"))


def test_two_splits_of_a_saved_dataset_are_two_corpora(tmp_path: Path) -> None:
    import datasets

    def split(data: bytes) -> Any:
        return datasets.Dataset.from_dict({"audio": [{"bytes": data, "path": "a.wav"}]})

    splits = {"train": split(b"RIFF1"), "test": split(b"RIFF2")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    saved = str(tmp_path / "saved")
    found = read_corpora((saved, f"datasets://{saved}:test"))
    assert [r.source() for r in found] == [b"RIFF1", b"RIFF2"]
    with pytest.raises(InputError, match="in two corpora"):
        read_corpora((saved, f"datasets://{saved}:train"))


def test_one_recording_in_two_datasets_is_found_by_its_content(tmp_path: Path) -> None:
    train = read_corpora((saved_dataset(tmp_path / "a", b"RIFF1", b"RIFF2", b"RIFF345"),))
    same = read_corpora((saved_dataset(tmp_path / "b", b"other", b"RIFF2"),))
    with pytest.raises(InputError, match="a/00000001 would be trained on, but b/00000001 is"):
        refuse_shared_audio(train, same)
    refuse_shared_audio(train, read_corpora((saved_dataset(tmp_path / "c", b"RIFF6"),)))
    refuse_shared_audio(train, [])


def test_a_dataset_whose_audio_is_none_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"audio": [7]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="saved row 0: 'audio' is int"):
        read_corpora((str(tmp_path / "saved"),))


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be loaded"):
        read_corpora(("datasets://no/such-dataset",))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300))
def test_any_bytes_as_metadata_raise_nothing_but_input_errors(tmp_path_factory, content) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "metadata.jsonl").write_bytes(content)
    try:
        assert all(r.corpus == "fuzz" for r in read_corpus(str(root), "fuzz"))
    except InputError as error:
        assert "metadata.jsonl" in str(error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0.wav", "no file can be called so: embedded null byte"),
        ("\ud800.wav", "no file can be called so"),
        ("x" * 300 + ".wav", "can't be opened: File name too long"),
        ("loop.wav", "no file can be called so|can't be opened"),
    ],
)
def test_a_name_that_no_file_can_have_is_that_rows_problem(
    tmp_path: Path, name: str, words: str
) -> None:
    root = touch(metadata(tmp_path / "n", {"file_name": "a.wav"}, {"file_name": name}), "a.wav")
    (root / "loop.wav").symlink_to("loop.wav")
    fine, bad = read_corpora((str(root),))
    assert fine.problem is None
    assert re.search(rf"metadata\.jsonl:2 but ({words})", bad.problem or "")
    assert bad.id.encode().startswith(b"n/")


def test_a_folder_that_is_closed_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root, who may run the tests, reads everything."""
    root = touch(tmp_path / "pack", "anna/1.wav", "bob/1.wav")
    _close(monkeypatch, "scandir", "bob")
    with pytest.raises(InputError, match="pack/bob can't be read: Permission denied"):
        read_corpora((str(root),))


def test_a_file_in_a_closed_folder_is_that_rows_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(metadata(tmp_path / "m", {"file_name": "in/a.wav"}), "in/a.wav")
    _close(monkeypatch, "stat", "a.wav")
    (found,) = read_corpora((str(root),))
    assert "metadata.jsonl:1 but can't be opened: Permission denied" in (found.problem or "")


def _close(monkeypatch: pytest.MonkeyPatch, call: str, name: str) -> None:
    """Make `os.<call>` refuse paths that end in `name`."""
    plain = getattr(os, call)

    def closed(path: Any = ".", *arguments: Any, **named: Any) -> Any:
        if not isinstance(path, int) and os.fspath(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return plain(path, *arguments, **named)

    monkeypatch.setattr(os, call, closed)


_NAMES = st.text(st.characters(), max_size=20) | st.sampled_from(["../a", "a/../", "x" * 300, "~"])


@settings(deadline=None, max_examples=150)
@given(name=_NAMES, speaker=st.none() | st.integers() | st.text(st.characters(), max_size=5))
def test_any_name_in_metadata_is_read_refused_or_that_rows_problem(
    tmp_path_factory: pytest.TempPathFactory, name: str, speaker: object
) -> None:
    root = tmp_path_factory.mktemp("names")
    metadata(root, {"file_name": f"{name}a.wav", "speaker": speaker})
    try:
        (found,) = read_corpora((str(root),))
    except InputError as error:
        assert "metadata.jsonl:1" in str(error)
        return
    assert found.problem is not None  # the folder holds no audio
    for text in (found.id, found.problem, found.speaker or "", str(found.path)):
        text.encode("utf-8")  # goes into Parquet


def test_names_of_corpora() -> None:
    assert corpus_name("/data/librispeech") == "librispeech"
    assert corpus_name("datasets://org/name:train") == "name"
    assert corpus_name("/data/pack/metadata.jsonl") == "pack"
    assert corpus_name("/data/train.clean") == "train.clean"

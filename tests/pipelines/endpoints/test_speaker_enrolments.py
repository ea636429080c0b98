"""The table of enrolments: several processes at once, restarts, limits."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goldcrest.pipelines.endpoints import speaker_enrolments
from goldcrest.pipelines.endpoints.speaker_enrolments import (
    Enrolments,
    FullError,
    Recording,
    pooled,
    unit,
)

ROOT = Path(__file__).parents[3]
WRITER = """
import sys
import numpy as np
from pathlib import Path
from goldcrest.pipelines.endpoints.speaker_enrolments import Enrolments, Recording

number = int(sys.argv[2])
book = Enrolments(Path(sys.argv[1]), max_speakers=1000, max_recordings=1000)
for place in range(25):
    vector = np.full(4, 1.0 + number + place)
    recording = Recording(digest=f"{number}-{place}", vector=vector, seconds=1.0)
    book.add("m", "shared", [recording])
    book.add("m", f"own{number}", [recording])
"""


@pytest.fixture
def book(tmp_path: Path) -> Enrolments:
    """An empty table with little room."""
    return Enrolments(tmp_path / "speakers.sqlite", max_speakers=3, max_recordings=2)


def recording(*vector: float, name: str = "r") -> Recording:
    """A recording of a vector."""
    return Recording(digest=name, vector=np.array(vector), seconds=1.0)


def test_vectors_are_pooled_as_in_the_evaluation() -> None:
    """Mean of unit vectors, whatever their lengths were: as TrialSet.pool, then made unit."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8)) * rng.uniform(0.1, 9, size=(5, 1))
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    assert pooled(vectors) == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    assert np.isfinite(unit(np.zeros(3))).all()


def test_a_restart_forgets_nothing(book: Enrolments, tmp_path: Path) -> None:
    book.add("m", "anna", [recording(3, 4)])
    book.close()
    again = Enrolments(tmp_path / "speakers.sqlite", max_speakers=3, max_recordings=2)
    assert again.reference("m", "anna") == pytest.approx([0.6, 0.8])
    assert [row["speaker"] for row in again.speakers()] == ["anna"]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "speakers.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(4)]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    book = Enrolments(path, max_speakers=1000, max_recordings=1000)
    counts = {row["speaker"]: row["recordings"] for row in book.speakers()}
    assert counts == {"shared": 100, "own0": 25, "own1": 25, "own2": 25, "own3": 25}


def test_a_gallery_sees_what_others_write(book: Enrolments, tmp_path: Path) -> None:
    other = Enrolments(tmp_path / "speakers.sqlite", max_speakers=3, max_recordings=2)
    assert book.gallery("m")[0] == []
    other.add("m", "bert", [recording(0, 1)])
    assert book.gallery("m")[0] == ["bert"]
    book.add("m", "anna", [recording(1, 0)])
    names, vectors = book.gallery("m")
    assert names == ["anna", "bert"]
    assert vectors == pytest.approx(np.eye(2))
    assert book.gallery("m")[1] is vectors  # kept while nobody writes
    other.remove("anna")
    assert book.gallery("m")[0] == ["bert"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 4096])
def test_a_gallery_is_the_plain_pooling_of_each_speaker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """However its rows fall into blocks."""
    monkeypatch.setattr(speaker_enrolments, "_BLOCK", block)
    book = Enrolments(tmp_path / "speakers.sqlite", max_speakers=9, max_recordings=9)
    rng = np.random.default_rng(0)
    voices = {f"s{count}": rng.normal(size=(count, 6)) for count in (3, 1, 7, 2)}
    for name, vectors in voices.items():
        book.add("m", name, [recording(*each, name=str(n)) for n, each in enumerate(vectors)])
        book.add("other", name, [recording(1, 2)])
    names, gallery = book.gallery("m")
    assert names == sorted(voices)
    assert gallery.dtype == np.float32
    assert gallery == pytest.approx(np.stack([pooled(voices[name]) for name in names]), abs=1e-6)


def test_nobody_waits_while_the_whole_table_is_read(
    book: Enrolments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve ends a replica whose health check waits for ten seconds."""
    begun, go_on, rebuilds = threading.Event(), threading.Event(), []
    pool_rows = speaker_enrolments._pool_rows

    def slow(rows: sqlite3.Cursor) -> tuple[list[str], np.ndarray]:
        rebuilds.append(rows)
        begun.set()
        assert go_on.wait(60)
        return pool_rows(rows)

    monkeypatch.setattr(speaker_enrolments, "_pool_rows", slow)
    book.add("m", "anna", [recording(1, 0)])
    with ThreadPoolExecutor() as threads:
        try:
            galleries = [threads.submit(book.gallery, "m") for _ in range(2)]
            assert begun.wait(60)
            threads.submit(book.check).result(10)
            assert (
                threads.submit(book.add, "m", "anna", [recording(0, 1, name="2")]).result(10) == 2
            )
            assert threads.submit(book.reference, "m", "anna").result(10) is not None
            assert len(rebuilds) == 1  # the other waits for this one
        finally:
            go_on.set()
        assert [each.result(60)[0] for each in galleries] == [["anna"]] * 2
    assert book.gallery("m")[1] == pytest.approx(np.full((1, 2), 0.5**0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_not_kept(book: Enrolments, value: float) -> None:
    """One would make the mean of all the speaker's recordings NaN."""
    book.add("m", "anna", [recording(1, 0)])
    with pytest.raises(ValueError, match="'anna' is not finite"):
        book.add("m", "anna", [recording(0, value, name="bad")])
    assert book.reference("m", "anna") == pytest.approx([1, 0])


def test_what_does_not_fit_changes_nothing(book: Enrolments) -> None:
    book.add("m", "anna", [recording(1, 0, name="1"), recording(0, 1, name="2")])
    with pytest.raises(FullError, match="2 recordings of 'anna'"):
        book.add("m", "anna", [recording(1, 1, name="3")])
    assert book.add("m", "anna", [recording(1, 0, name="1")]) == 2  # known already
    for name in ("bert", "cleo"):
        book.add("m", name, [recording(1, 0)])
    with pytest.raises(FullError, match="3 speakers"):
        book.add("m", "dora", [recording(1, 0)])
    assert not book.known("dora")
    assert book.remove("bert") == 1
    assert book.add("m", "dora", [recording(1, 0)]) == 1


def test_models_are_apart(book: Enrolments) -> None:
    book.add("m", "anna", [recording(1, 0)])
    assert book.reference("n", "anna") is None
    assert book.known("anna")
    book.add("n", "anna", [recording(0, 1)])
    assert book.reference("m", "anna") == pytest.approx([1, 0])
    assert book.remove("anna") == 2
    assert not book.known("anna")


def test_who_is_forgotten_leaves_no_bytes(book: Enrolments, tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=64)
    book.add("m", "anna", [recording(*vector)])
    trace = unit(vector).astype("<f4").tobytes()
    book.remove("anna")
    book.close()  # the write-ahead log is emptied into the file
    assert trace not in (tmp_path / "speakers.sqlite").read_bytes()


def test_nothing_that_is_asked_often_reads_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SQLite's own plans; those of the triggers' conditions have to be asked for."""
    path = tmp_path / "speakers.sqlite"
    statements: list[str] = []

    def traced(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = real_connect(*arguments, **named)
        connection.set_trace_callback(statements.append)
        return connection

    real_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", traced)
    book = Enrolments(path, max_speakers=3, max_recordings=2)
    statements.clear()
    book.add("m", "anna", [recording(1, 0)])
    book.add("n", "anna", [recording(1, 0)])
    assert book.known("anna")
    assert book.reference("m", "anna") is not None
    book.remove("anna")
    asked = {each for each in statements if each.split()[0] in ("SELECT", "INSERT", "DELETE")}
    assert len(asked) >= 5
    with real_connect(path) as connection:
        triggers = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")
        for (trigger,) in triggers.fetchall():
            (condition,) = re.findall(r"WHEN (.*)\nBEGIN", trigger)
            asked.add("SELECT " + re.sub("(NEW|OLD).speaker", "'anna'", condition))
        plans = {
            each: [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {each}")]
            for each in asked
        }
    scans = [(each, plan) for each, plan in plans.items() if "SCAN enrolment" in str(plan)]
    assert not scans
    assert any("enrolment_speaker" in str(plan) for plan in plans.values())


def test_a_database_of_an_earlier_version_is_counted_once(tmp_path: Path) -> None:
    """It has neither index nor total; an old server that still writes to it is counted too."""
    path = tmp_path / "speakers.sqlite"
    book = Enrolments(path, max_speakers=2, max_recordings=2)
    book.add("m", "anna", [recording(1, 0)])
    book.add("n", "anna", [recording(1, 0)])
    book.close()
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "DROP INDEX enrolment_speaker; DROP TABLE total; "
            "DROP TRIGGER speaker_comes; DROP TRIGGER speaker_goes;"
        )
    again = Enrolments(path, max_speakers=2, max_recordings=2)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO enrolment (model, speaker, recording, vector, seconds) "
            "VALUES ('m', 'bert', 'r', x'00', 1)"
        )
    with pytest.raises(FullError, match="2 speakers"):
        again.add("m", "cleo", [recording(1, 0)])
    assert again.add("m", "anna", [recording(0, 1, name="2")]) == 2
    assert again.remove("anna") == 3
    assert again.add("m", "cleo", [recording(1, 0)]) == 1


def test_a_smaller_limit_turns_only_new_names_away(book: Enrolments, tmp_path: Path) -> None:
    for name in ("anna", "bert"):
        book.add("m", name, [recording(1, 0)])
    smaller = Enrolments(tmp_path / "speakers.sqlite", max_speakers=1, max_recordings=2)
    assert smaller.add("m", "anna", [recording(0, 1, name="2")]) == 2
    with pytest.raises(FullError, match="1 speakers"):
        smaller.add("m", "cleo", [recording(1, 0)])

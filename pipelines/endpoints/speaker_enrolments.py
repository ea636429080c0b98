"""Who is enrolled: unit-length embeddings by model and speaker, in SQLite.

Replicas on one node share the file: write-ahead logging lets them read while one writes, and a
commit is on disk before it is acknowledged. What reads the whole table, which takes seconds, has a
connection of its own: nobody else waits for it. An embedding means something to its own model only,
so rows are kept by the model's fingerprint. A recording is known by its SHA-256: a client that
repeats a request after a timeout does not weigh it twice. The audio itself is not kept.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goldcrest.cluster.errors import InputError

SCHEMA = 1
_BUSY_SECONDS = 5.0
_BLOCK = 4096  # rows that a rebuild of the gallery holds
_TABLE = """
CREATE TABLE IF NOT EXISTS enrolment (
    model TEXT NOT NULL,
    speaker TEXT NOT NULL,
    recording TEXT NOT NULL,
    vector BLOB NOT NULL,
    seconds REAL NOT NULL,
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    PRIMARY KEY (model, speaker, recording)
) WITHOUT ROWID
"""
_BESIDE = (  # made where they are missing, so also in the databases of earlier versions
    "CREATE INDEX IF NOT EXISTS enrolment_speaker ON enrolment (speaker)",
    """
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 1), speakers INTEGER NOT NULL)
""",
    """
CREATE TRIGGER IF NOT EXISTS speaker_comes AFTER INSERT ON enrolment
WHEN (SELECT count(*) FROM (SELECT 1 FROM enrolment WHERE speaker = NEW.speaker LIMIT 2)) = 1
BEGIN UPDATE total SET speakers = speakers + 1 WHERE id = 1; END
""",
    """
CREATE TRIGGER IF NOT EXISTS speaker_goes AFTER DELETE ON enrolment
WHEN NOT EXISTS (SELECT 1 FROM enrolment WHERE speaker = OLD.speaker)
BEGIN UPDATE total SET speakers = speakers - 1 WHERE id = 1; END
""",
    """
INSERT INTO total SELECT 1, (SELECT count(DISTINCT speaker) FROM enrolment)
WHERE NOT EXISTS (SELECT 1 FROM total)
""",
)
"""How many speakers there are is counted as they come and go: counting them anew for each enrolment
reads the whole table while nobody else may write. Triggers see every writer, other versions too."""


class FullError(Exception):
    """There is no room for another speaker, or for another recording of this one."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One enrolled recording: SHA-256 of its bytes, embedding (E,), seconds of speech."""

    digest: str
    vector: np.ndarray
    seconds: float


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., E) scaled to length 1, float32."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def pooled(vectors: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(N, E) -> (E,): the direction of the mean of unit vectors, itself of length 1."""
    return unit(unit(np.asarray(vectors)).mean(axis=0))


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
    )


class Enrolments:
    """The table of one database file; safe to use from several threads and processes."""

    def __init__(self, path: Path, *, max_speakers: int, max_recordings: int) -> None:
        self._path = path
        self._max_speakers = max_speakers
        self._max_recordings = max_recordings
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # of the whole table: seconds, for which no writer waits
        self._gallery: dict[str, tuple[int, list[str], np.ndarray]] = {}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = _connect(path)
            self._prepare()
            self._reader = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"the database {path} cannot be used: {error}") from None

    def _prepare(self) -> None:
        path, connection = self._path, self._connection
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA):
            raise InputError(f"the database {path} has schema {version}, this version has {SCHEMA}")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise InputError(
                f"the database {path} cannot keep a write-ahead log",
                hint="place it on a local disk: network file systems do not lock reliably",
            )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # who is forgotten is overwritten
        path.chmod(0o600)  # voices are personal data
        with self._transaction():
            connection.execute(_TABLE)
            for statement in _BESIDE:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, from the first read on; all or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the database."""
        with self._reading:
            self._reader.close()
        with self._lock:
            self._connection.close()

    def check(self) -> None:
        """Raise sqlite3.Error where the database does not answer."""
        with self._lock:
            self._connection.execute("SELECT 1 FROM enrolment LIMIT 1").fetchone()

    def add(self, model: str, speaker: str, recordings: Sequence[Recording]) -> int:
        """Enrol recordings of a speaker; how many there now are. FullError changes nothing.

        ValueError for a vector that is not finite: with it, the speaker's mean would be NaN.
        """
        if not all(np.isfinite(each.vector).all() for each in recordings):
            raise ValueError(f"an embedding of '{speaker}' is not finite")
        rows = [
            (model, speaker, each.digest, unit(each.vector).astype("<f4").tobytes(), each.seconds)
            for each in recordings
        ]
        with self._transaction() as connection:
            new = not self._has(speaker)
            connection.executemany(
                "INSERT OR IGNORE INTO enrolment (model, speaker, recording, vector, seconds) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            (speakers,) = connection.execute("SELECT speakers FROM total WHERE id = 1").fetchone()
            (count,) = connection.execute(
                "SELECT count(*) FROM enrolment WHERE model = ? AND speaker = ?", (model, speaker)
            ).fetchone()
            if new and speakers > self._max_speakers:
                raise FullError(f"{self._max_speakers} speakers are enrolled: there is no room")
            if count > self._max_recordings:
                raise FullError(
                    f"{self._max_recordings} recordings of '{speaker}' are kept at most"
                )
        return int(count)

    def reference(self, model: str, speaker: str) -> np.ndarray | None:
        """The pooled embedding (E,) of a speaker under a model; None if there is none."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT vector FROM enrolment WHERE model = ? AND speaker = ?", (model, speaker)
            ).fetchall()
        return pooled([_vector(row[0]) for row in rows]) if rows else None

    def known(self, speaker: str) -> bool:
        """Whether a speaker is enrolled under any model."""
        with self._lock:
            return self._has(speaker)

    def _has(self, speaker: str) -> bool:
        found = self._connection.execute(
            "SELECT 1 FROM enrolment WHERE speaker = ? LIMIT 1", (speaker,)
        )
        return found.fetchone() is not None

    def gallery(self, model: str) -> tuple[list[str], np.ndarray]:
        """All speakers of a model and their pooled embeddings, names and (S, E)."""
        with self._reading:
            # Changed by every commit but this connection's own, and it makes none. A commit between
            # here and the rows is in them already, and the next call reads them once more.
            (version,) = self._reader.execute("PRAGMA data_version").fetchone()
            kept = self._gallery.get(model)
            if kept is None or kept[0] != version:
                rows = self._reader.execute(
                    "SELECT speaker, vector FROM enrolment WHERE model = ? ORDER BY speaker",
                    (model,),
                )
                kept = (version, *_pool_rows(rows))
                self._gallery = {model: kept}
        return kept[1], kept[2]

    def speakers(self) -> list[dict[str, Any]]:
        """One row per speaker and model, by name."""
        with self._reading:
            rows = self._reader.execute(
                "SELECT speaker, model, count(*), sum(seconds), min(created) FROM enrolment "
                "GROUP BY speaker, model ORDER BY speaker, model"
            ).fetchall()
        names = ("speaker", "model", "recordings", "seconds", "created")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def remove(self, speaker: str) -> int:
        """Forget a speaker under every model; how many recordings that were."""
        with self._transaction() as connection:
            found = connection.execute("DELETE FROM enrolment WHERE speaker = ?", (speaker,))
        return found.rowcount


def _vector(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, dtype="<f4")


def _pool_rows(rows: sqlite3.Cursor) -> tuple[list[str], np.ndarray]:
    """Sorted (speaker, vector) rows -> names and pooled (S, E), holding a block of rows at a time.

    The direction of a mean is that of the sum.
    """
    names: list[str] = []
    sums: list[np.ndarray] = []
    while block := rows.fetchmany(_BLOCK):
        speakers = [speaker for speaker, _ in block]
        vectors = unit(_vector(b"".join(blob for _, blob in block)).reshape(len(block), -1))
        starts = [n for n, name in enumerate(speakers) if n == 0 or name != speakers[n - 1]]
        found = list(np.add.reduceat(vectors, starts))
        if names and names[-1] == speakers[0]:  # begun in the block before
            sums[-1] += found.pop(0)
            del starts[0]
        names += [speakers[n] for n in starts]
        sums += found
    return names, unit(np.stack(sums)) if names else np.empty((0, 0), np.float32)

"""Who is held out: all rows of one prompt are on one side, whatever the order of the files.

Files may say what they are for. Where none is for testing (or validation), a share of the prompts
of the training files is held out: a prompt's side is read off a hash of the prompt and the seed, so
no list of prompts has to be kept and a row added later moves no other. A hash can leave a side of a
small corpus without a single prompt; the prompt with the smallest hash then goes there.

A prompt that is in evaluation files as well is left out of training: what is evaluated must not
have been learned by heart.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from goldcrest.tasks.language.examples import Example, Split

_HELD_ROWS = 10_000  # of one prompt, kept in memory until its side is known


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with one of its answers, before the splits are made.

    `instruction`: the prompt is the same for every row, as an instruction is.
    """

    id: str
    prompt: str
    answer: str
    instruction: bool = False

    @property
    def key(self) -> bytes:
        """What must be on one side: the prompt, or the text where prompts tell nothing apart."""
        told = self.answer if self.instruction else self.prompt or self.answer
        return hashlib.blake2b(told.encode(), digest_size=16).digest()


def place_of(key: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, evenly spread over keys."""
    digest = hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big") / 2.0**64


def sides(keys: Iterable[str], shares: Mapping[Split, float], seed: int) -> dict[str, Split]:
    """The split of every key of a list that is in memory, by its place.

    `shares` of the keys are held out. An evaluation split that gets none is given the key with the
    smallest place, as long as another one is left to train; where none is, the last one trains.
    """
    places = {key: place_of(key.encode(), seed) for key in keys}
    found: dict[str, Split] = {}
    for key in sorted(places, key=lambda each: (places[each], each)):
        found[key], place = "train", places[key]
        for split, share in shares.items():
            if place < share:
                found[key] = split
                break
            place -= share
    if found and "train" not in found.values():
        found[list(found)[-1]] = "train"
    for split, share in shares.items():
        training = [key for key, side in found.items() if side == "train"]
        if share > 0 and split not in found.values() and len(training) > 1:
            found[training[0]] = split
    return found


class EvaluationRows:
    """The rows of the evaluation splits, in an SQLite file while they are collected.

    Rows of one prompt may be anywhere in a corpus, so they are brought together on disk. A context
    manager; a file that is left from a lost attempt is begun anew.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE held (key BLOB PRIMARY KEY, split TEXT, first INTEGER) WITHOUT ROWID;"
            "CREATE TABLE item (number INTEGER PRIMARY KEY, key BLOB, id TEXT, prompt TEXT,"
            " answer TEXT); CREATE INDEX by_key ON item (key);"
        )
        self._database.execute("BEGIN")  # nobody reads the file later: nothing is ever committed
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def split_of(self, key: bytes) -> str | None:
        """The evaluation split that holds a key, None where none does."""
        row = self._database.execute("SELECT split FROM held WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def add(self, split: Split, item: Item) -> bool:
        """Take a row in; False where its prompt is in the other evaluation split already."""
        self._count += 1
        self._database.execute(
            "INSERT OR IGNORE INTO held VALUES (?, ?, ?)", (item.key, split, self._count)
        )
        if self.split_of(item.key) != split:
            return False
        self._database.execute(
            "INSERT INTO item VALUES (?, ?, ?, ?, ?)",
            (self._count, item.key, item.id, item.prompt, item.answer),
        )
        return True

    def examples(self, split: Split) -> Iterator[Example]:
        """One example per prompt, in the order in which prompts were first seen."""
        rows = self._database.execute(
            "SELECT item.key, id, prompt, answer FROM held JOIN item ON item.key = held.key"
            " WHERE split = ? ORDER BY first, number",
            (split,),
        )
        for _, group in itertools.groupby(rows, key=lambda row: row[0]):
            same = list(group)
            _, name, prompt, answer = same[0]
            references = tuple(dict.fromkeys(row[3] for row in same)) if prompt else ()
            yield Example(name, prompt, answer, references)


class HoldOut:
    """Divides the rows of training files: `shares` of the prompts go to evaluation splits.

    `place(item)` and finally `close()` yield rows with their split; a row may come out later than
    it went in, and none is lost.
    """

    def __init__(self, shares: Mapping[Split, float], seed: int) -> None:
        self._shares = {split: share for split, share in shares.items() if share > 0}
        self._seed = seed
        self._missing = list(self._shares)  # splits without a prompt so far
        self._waiting: dict[bytes, list[Item]] = {}  # of the smallest places that would train
        self._trained = False

    def place(self, item: Item) -> Iterator[tuple[Split, Item]]:
        """The rows, this one or earlier ones, whose side is now known."""
        key = item.key
        place = place_of(key, self._seed)
        for split, share in self._shares.items():
            if place < share:
                if split in self._missing:
                    self._missing.remove(split)
                yield split, item
                yield from self._release(len(self._missing))
                return
            place -= share
        if not self._missing:
            self._trained = True
            yield "train", item
            return
        self._waiting.setdefault(key, []).append(item)
        if len(self._waiting[key]) > _HELD_ROWS:
            self._missing.clear()  # one prompt is most of the corpus: no row can wait
        yield from self._release(len(self._missing))

    def close(self) -> Iterator[tuple[Split, Item]]:
        """The rest: a split without a prompt gets the smallest place, if one is left to train."""
        for split in self._missing:
            if len(self._waiting) + self._trained > 1:
                chosen = min(self._waiting, key=self._place, default=None)
                if chosen is not None:
                    yield from ((split, item) for item in self._waiting.pop(chosen))
        yield from self._release(0)

    def _place(self, key: bytes) -> float:
        return place_of(key, self._seed)

    def _release(self, keep: int) -> Iterator[tuple[Split, Item]]:
        """Train with all waiting prompts but the `keep` smallest."""
        while len(self._waiting) > keep:
            yield from self._train(max(self._waiting, key=self._place))

    def _train(self, key: bytes) -> Iterator[tuple[Split, Item]]:
        self._trained = True
        yield from (("train", item) for item in self._waiting.pop(key))

"""Leases: at most one process works on a key, and a late one can't do harm.

A lease is a small record that its holder touches every quarter of its time to live. Every new
lease on a key has a larger number than all before it, its *fence*. The rules:

1. A record is free when its holder released it, when its process is dead (same machine: known at
   once), or when it has been silent for too long (any machine: see `Silence`).
2. Whoever finds the newest record free makes the next one. On a file system that is one exclusive
   creation of `<fence>.json`, so of many contenders exactly one succeeds; the old record is never
   removed first, so there is no moment in which two could.
3. A holder whose record is gone, or is no longer the newest, has lost the lease and may not commit.
   The store asks right before its commit point.

No clock of one host is ever compared with that of another.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.process_id import ProcessId

HEARTBEATS_PER_TTL = 4
_RECORD = re.compile(r"(\d{12})\.(json|released)")
_POLL_FIRST, _POLL_LAST = 0.01, 0.5  # seconds between two looks at a lease that another holds


@dataclass(kw_only=True)
class Lease:
    """The right to compute one key, until it is lost."""

    key: str  # the artifact's key
    owner: str  # who holds it, for people
    fence: int  # larger than that of every earlier lease on this key
    nonce: str  # 16 hex digits; tells two leases apart whatever their numbers
    ttl: float  # seconds of silence after which others may take over
    lost: bool = field(default=False)  # set by the heartbeat once another has taken over

    @property
    def attempt(self) -> str:
        """Name of the work done under this lease; sorts by fence."""
        return f"{self.fence:012d}-{self.nonce}"


class LeaseBook(Protocol):
    """Where leases are kept: a folder (`FileLeases`) or a bucket (`lease_remote.py`)."""

    def acquire(
        self, key: str, *, owner: str, ttl: float, wait: Callable[[str], None] | None
    ) -> Lease:
        """Block until the lease on `key` is ours; `wait(note)` is called now and then."""
        ...

    def renew(self, lease: Lease) -> bool:
        """Give a sign of life; False when the lease is lost."""
        ...

    def holds(self, lease: Lease) -> bool:
        """Whether `lease` is still the newest on its key."""
        ...

    def release(self, lease: Lease) -> None:
        """Give the lease back; nothing happens if it is lost."""
        ...

    def held(self, key: str) -> object:
        """True in a condition if somebody holds the lease who is not known to be dead."""
        ...


@contextmanager
def hold(
    book: LeaseBook,
    key: str,
    *,
    owner: str,
    ttl: float,
    wait: Callable[[str], None] | None = None,
) -> Iterator[Lease]:
    """Take the lease on `key`, keep it alive from a thread, give it back at the end."""
    if ttl <= 0:
        raise ValueError(f"a lease needs a time to live above 0 s, not {ttl}")
    lease = book.acquire(key, owner=owner, ttl=ttl, wait=wait)
    stop = threading.Event()
    beat = threading.Thread(
        target=_heartbeat, args=(book, lease, stop), name=f"lease {key[:12]}", daemon=True
    )
    beat.start()
    try:
        yield lease
    finally:
        stop.set()
        beat.join()
        book.release(lease)


def _heartbeat(book: LeaseBook, lease: Lease, stop: threading.Event) -> None:
    """Renew until told to stop or the lease is lost; an I/O error waits for the next beat."""
    while not stop.wait(lease.ttl / HEARTBEATS_PER_TTL):
        try:
            if not book.renew(lease):
                lease.lost = True
                return
        except OSError:
            continue


def lost_lease(lease: Lease) -> StoreError:
    """The error of a writer that comes too late."""
    return StoreError(
        f"the lease of '{lease.owner}' on {lease.key[:12]} (fence {lease.fence}) was lost: it gave "
        f"no sign of life for {lease.ttl:g} s and another process took over",
        hint="nothing was written; repeat the command to use the other's result",
    )


class Silence:
    """How long records have given no sign of life, by this process's own monotonic clock.

    The clocks of hosts disagree, are stepped, and stand still while a laptop sleeps, so the age of
    a time stamp alone proves nothing. What counts is a sign that did not change while *we* watched.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, float]] = {}

    def seconds(self, name: str, sign: object) -> float:
        """Seconds that record `name` has shown the same `sign`; 0 when it is new."""
        now = time.monotonic()
        before = self._seen.get(name)
        if before is None or before[0] != sign:
            self._seen[name] = (sign, now)
            return 0.0
        return now - before[1]


def polls() -> Iterator[float]:
    """Waiting times between looks: growing, with jitter so that waiters don't march in step."""
    pause = _POLL_FIRST
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * 1.5, _POLL_LAST)


class Waiting:
    """Tells the caller of `acquire`, at most once in five seconds, whom it waits for."""

    def __init__(self, wait: Callable[[str], None] | None) -> None:
        self._wait = wait
        self._next = 0.0

    def tell(self, owner: str, process: ProcessId | None) -> None:
        """Call `wait` if it is time to."""
        if self._wait is not None and time.monotonic() >= self._next:
            place = f" (pid {process.pid} on {process.host})" if process is not None else ""
            self._wait(f"waiting for '{owner}'{place}, which works on the same step")
            self._next = time.monotonic() + 5.0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a lease's record says about its holder."""

    owner: str
    nonce: str
    ttl: float
    process: ProcessId | None  # None where the record is damaged

    @classmethod
    def new(cls, owner: str, ttl: float) -> Record:
        """A record for this process under a fresh nonce."""
        return cls(owner=owner, nonce=secrets.token_hex(8), ttl=ttl, process=ProcessId.current())

    @classmethod
    def parse(cls, text: bytes) -> Record:
        """Read a record; a damaged one is an unknown holder that only silence can end."""
        try:
            value = json.loads(text)
            return cls(
                owner=str(value["owner"]),
                nonce=str(value["nonce"]),
                ttl=float(value["ttl"]),
                process=ProcessId.from_json(value["process"]),
            )
        except (ValueError, KeyError, TypeError):
            return cls(owner="unknown", nonce="", ttl=60.0, process=None)

    def json(self, **more: Any) -> bytes:
        """The record as one line of JSON, with further facts."""
        facts = {"owner": self.owner, "nonce": self.nonce, "ttl": self.ttl, **more}
        facts["process"] = self.process.to_json() if self.process is not None else None
        return (json.dumps(facts, sort_keys=True) + "\n").encode()

    @property
    def dead(self) -> bool:
        """Whether the holder is known to be gone."""
        return self.process is not None and self.process.state() == "dead"


class FileLeases:
    """Leases as files `<root>/<key>/<fence>.json`; a heartbeat is a new modification time.

    Needs what every POSIX file system has (NFS included): a hard link to a name that exists fails.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def acquire(
        self, key: str, *, owner: str, ttl: float, wait: Callable[[str], None] | None = None
    ) -> Lease:
        """Block until the lease is ours. See `LeaseBook`."""
        record = Record.new(owner, ttl)
        silence, waiting, pauses = Silence(), Waiting(wait), polls()
        candidate = self._write_candidate(key, record)
        try:
            while True:
                top = self.newest(key)
                if top is None or self.is_free(top, silence, clock=candidate):
                    fence = 1 if top is None else _fence(top) + 1
                    if self._claim(key, candidate, fence):
                        return Lease(key=key, owner=owner, fence=fence, nonce=record.nonce, ttl=ttl)
                else:
                    held = _read(top)
                    if held is not None:
                        waiting.tell(held.owner, held.process)
                time.sleep(next(pauses))
        finally:
            candidate.unlink(missing_ok=True)

    def _write_candidate(self, key: str, record: Record) -> Path:
        """The complete record under a private name, ready to be linked to a fence."""
        candidate = self.root / key / f"{record.nonce}.candidate"
        while True:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            try:
                candidate.write_bytes(record.json())
                return candidate
            except FileNotFoundError:
                continue  # the maintenance removed the empty folder in between

    def _claim(self, key: str, candidate: Path, fence: int) -> bool:
        """Try to make `fence` ours: one exclusive step, then a look whether it was worth having."""
        path = self.root / key / f"{fence:012d}.json"
        os.utime(candidate)
        try:
            os.link(candidate, path)
        except (FileExistsError, FileNotFoundError):
            return False
        if self.newest(key) != path:  # we looked at an old picture: a later fence exists
            path.unlink(missing_ok=True)
            return False
        for old in self._records(key)[:-1]:
            old.unlink(missing_ok=True)
        return True

    def _records(self, key: str) -> list[Path]:
        """All records of a key, oldest fence first."""
        try:
            names = [path.name for path in (self.root / key).iterdir()]
        except FileNotFoundError:
            return []
        return [self.root / key / name for name in sorted(names) if _RECORD.fullmatch(name)]

    def newest(self, key: str) -> Path | None:
        """The record with the largest fence, released or not."""
        return next(reversed(self._records(key)), None)

    def is_free(self, path: Path, silence: Silence, *, clock: Path) -> bool:
        """Rule 1. `clock` is a file of ours beside `path`: its fresh stamp is that disk's now."""
        if path.suffix == ".released":
            return True
        record = _read(path)
        if record is None or record.dead:
            return True
        try:
            stamp = path.stat().st_mtime_ns
            os.utime(clock)
            age = (clock.stat().st_mtime_ns - stamp) / 1e9
        except FileNotFoundError:
            return False  # it changed under our eyes: look again
        silent = silence.seconds(str(path), stamp)
        return silent >= record.ttl or (age > record.ttl and silent >= record.ttl / 2)

    def held(self, key: str) -> Record | None:
        """Who holds the lease, None if it was never taken or was released or its holder is dead."""
        top = self.newest(key)
        if top is None or top.suffix == ".released":
            return None
        record = _read(top)
        return None if record is None or record.dead else record

    def renew(self, lease: Lease) -> bool:
        """Touch the record; False when it is not the newest any more."""
        if not self.holds(lease):
            return False
        try:
            os.utime(self._path(lease))
        except FileNotFoundError:
            return False
        return True

    def holds(self, lease: Lease) -> bool:
        """Whether the newest record of the key is this lease's."""
        path = self._path(lease)
        record = _read(path) if self.newest(lease.key) == path else None
        return record is not None and record.nonce == lease.nonce

    def release(self, lease: Lease) -> None:
        """Mark the record released. It stays, so that the next fence is a larger one."""
        if self.holds(lease):
            path = self._path(lease)
            try:
                path.rename(path.with_suffix(".released"))
            except FileNotFoundError:
                return

    def _path(self, lease: Lease) -> Path:
        return self.root / lease.key / f"{lease.fence:012d}.json"


def _fence(path: Path) -> int:
    return int(path.name[:12])


def _read(path: Path) -> Record | None:
    """The record in a file, None if the file has gone."""
    try:
        return Record.parse(path.read_bytes())
    except FileNotFoundError:
        return None

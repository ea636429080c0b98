"""Garbage of a store in a folder: what it is, and when it is safe to remove.

Everything here is judged by its owner first and by its age only where the owner lives on another
host: unfinished work belongs to a process whose identity is in the folder's name. What is removed
is renamed into `tmp/` first, so that a reader never sees half of it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.lease import FileLeases
from goldcrest.cluster.process_id import ProcessId
from goldcrest.cluster.store import remove_tree, workplace_facts
from goldcrest.cluster.store_stamps import BELIEVED_SECONDS

if TYPE_CHECKING:
    from goldcrest.cluster.store import Store
    from goldcrest.cluster.store_local import LocalStore

_ASIDE = ("*/.*", "*/logs/.*", "*/tune-*")  # below runs/: what its writer would take away itself
_TRASH = re.compile(r"trash\.([0-9a-f]{16})-(\d+)-([\d.]*)\.[0-9a-f]{8}")
Candidate = tuple[str, Path, str]  # what it is, where, why it may go


def collect(
    store: LocalStore,
    keep: set[str] | None,
    *,
    older_than: float,
    dry_run: bool,
    grace: float,
    owner: Store | None = None,
) -> list[dict[str, Any]]:
    """Remove (or only list) all garbage. Arguments and rows as in `Store.gc`.

    `owner` is the bucket whose cache and workplace `store` is: it knows what is committed and who
    holds which lease.
    """
    owner = owner or store
    found: list[Iterable[Candidate]] = [
        _unfinished_work(store, grace),
        _half_written(store, grace),
        _scratch(store, owner, keep, max(older_than, grace)),
        _leases(store.leases, grace),
        _stamps(store, grace),
    ]
    if keep is not None:
        found.insert(0, _artifacts(store, owner, keep, older_than))
        found.append(_quarantined(store, older_than))
    rows = []
    for candidates in found:
        for what, path, reason in candidates:
            size = tree_bytes(path)
            if not dry_run:
                remove(store, path)
            rows.append({"what": what, "path": str(path), "bytes": size, "reason": reason})
    return rows


def tree_bytes(path: Path) -> int:
    """Bytes in a file or in all files of a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for member in [path, *path.rglob("*")]:
        try:
            total += member.lstat().st_size if member.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def remove(store: LocalStore, path: Path) -> None:
    """Remove a file or folder of the store: out of sight by a rename, then off the disk."""
    if path.is_dir():
        me = ProcessId.current()
        name = f"trash.{me.machine}-{me.pid}-{me.started}.{secrets.token_hex(4)}"
        away = store.root / "tmp" / name
        try:
            path.rename(away)
        except FileNotFoundError:
            return
        remove_tree(away)
    else:
        path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since the newest change in a tree; 0 if it vanished."""
    newest = 0.0
    try:
        newest = path.stat().st_mtime
        for member in path.rglob("*"):
            newest = max(newest, member.lstat().st_mtime)
    except FileNotFoundError:
        return 0.0
    return time.time() - newest


def _unfinished_work(store: LocalStore, grace: float) -> Iterator[Candidate]:
    """Folders of `begin` whose writer is dead, and removals that were cut short."""
    for path in _list(store.root / "tmp"):
        facts = workplace_facts(path.name)
        writer, current = _trash_owner(path.name), False
        if facts is not None:
            key, attempt, writer = facts
            held = store.leases.held(key)
            current = held is not None and attempt.endswith(held.nonce)
        state = writer.state() if writer is not None else "unknown"
        if state == "dead":
            yield "unfinished work", path, "its writer is dead"
        elif state == "unknown" and not current and _age(path) > grace:
            yield "unfinished work", path, "its writer holds no lease and has been silent"


def _trash_owner(name: str) -> ProcessId | None:
    match = _TRASH.fullmatch(name)
    if match is None:
        return None
    return ProcessId(host="", machine=match[1], pid=int(match[2]), started=match[3])


def _half_written(store: LocalStore, grace: float) -> Iterator[Candidate]:
    """What the writers of run records left beside them when they died."""
    for path in sorted(path for form in _ASIDE for path in (store.root / "runs").glob(form)):
        writer = ProcessId.marked(path.name)
        state = writer.state() if writer is not None else "alive"  # no mark: part of the record
        if state == "dead":
            yield "half-written", path, "its writer is dead"
        elif state == "unknown" and _age(path) > grace:
            yield "half-written", path, "its writer has been silent"


def _scratch(
    store: LocalStore, owner: Store, keep: set[str] | None, age: float
) -> Iterator[Candidate]:
    """Scratch folders that nobody computes in: of committed keys, and with `keep` abandoned ones.

    Checkpoints of a config that failed or was given up serve only a repetition of the same config.
    """
    for path in _list(store.root / "scratch"):
        key = path.name
        if not re.fullmatch(r"[0-9a-f]{64}", key) or owner.leases.held(key):
            continue
        if owner.manifest(key) is not None:
            yield "scratch", path, "its step is committed"
        elif keep is not None and key not in keep and _age(path) >= age:
            yield "scratch", path, "its step was given up, and it is not kept"


def _leases(leases: FileLeases, grace: float) -> Iterator[Candidate]:
    """Lease folders that nobody holds and nobody touched lately, and candidates of the dead.

    The wait matters even for released ones: a contender that listed the folder a moment ago must
    not find the fences starting again at 1.
    """
    for folder in _list(leases.root):
        if leases.held(folder.name) is None:
            if _age(folder) > min(grace, 3600.0):
                yield "lease", folder, "nobody holds it"
        elif _age(folder) > max(grace, 3600.0):
            yield "lease", folder, "its holder has been silent"


def _stamps(store: LocalStore, grace: float) -> Iterator[Candidate]:
    """Notes about what was verified: of artifacts that are gone, or of long ago."""
    for folder in _list(store.root / "verified"):
        for path in _list(folder):
            gone = (
                path.suffix != ".json"
                or not (store.root / "artifacts" / path.name[:2] / path.stem).exists()
            )
            if gone and _age(path) > min(grace, 3600.0):
                yield "verification note", path, "its artifact is gone"
            elif _age(path) > BELIEVED_SECONDS:
                yield "verification note", path, "it is too old to be believed"


def _artifacts(
    store: LocalStore, owner: Store, keep: set[str], older_than: float
) -> Iterator[Candidate]:
    """Committed artifacts that are not kept, old enough, and not being worked on.

    In a bucket's cache the age is that of the copy, which was made later than the artifact.
    """
    what = "artifact" if owner is store else "cached artifact"
    for key in store.all_keys():
        place = store.place(key)
        if key not in keep and _age(place) >= older_than and not owner.leases.held(key):
            yield what, place, "it is not kept"


def _quarantined(store: LocalStore, older_than: float) -> Iterator[Candidate]:
    """Damaged artifacts and the notes of why."""
    for path in _list(store.root / "quarantine"):
        if _age(path) >= older_than:
            yield "quarantined", path, "it is damaged"


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []

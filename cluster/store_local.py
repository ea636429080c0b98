"""The store on a file system: an artifact appears by one rename of a complete folder.

Commit: members written in `tmp/` -> hashed and fsynced -> manifest, fsynced -> folders fsynced ->
lease still ours? -> rename onto the final name, which fails if something lies there -> parent
fsynced. The rename is the only commit point: before it there is nothing, after it everything.
A rename never replaces a folder with content, so a writer that lost its lease between the last look
and the rename can add a complete artifact where there is none, and can't replace one.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from goldcrest.cluster import store_maintenance
from goldcrest.cluster.artifact import MANIFEST, Artifact
from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.lease import FileLeases, Lease, lost_lease
from goldcrest.cluster.process_id import ProcessId
from goldcrest.cluster.store import Store, check_key, read_json, storage_errors
from goldcrest.cluster.store_manifest import (
    complete,
    seal,
    sync_folder,
    sync_tree,
    unseal,
    write_durably,
)
from goldcrest.cluster.store_stamps import Stamps


class LocalStore(Store):
    """A store in a folder of this host or of a network file system."""

    leases: FileLeases
    shared_paths = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self.leases = FileLeases(root / "leases")
        self.stamps = Stamps(root / "verified" / ProcessId.current().machine)
        with storage_errors(root):
            for name in ("artifacts", "tmp"):
                (root / name).mkdir(parents=True, exist_ok=True)

    def place(self, key: str) -> Path:
        """Where the artifact of `key` lies, or would."""
        return self.root / "artifacts" / check_key(key)[:2] / key

    def find(self, key: str, *, verify: bool = True) -> Artifact | None:
        """See `Store.find`."""
        place = self.place(key)
        with storage_errors(place):
            identity = _inode(place)
            if identity is None:
                return None
            try:
                manifest = self._load(key, verify)
            except ValueError as fault:
                self._refuse(key, identity, str(fault))
                return None
        return Artifact(place, manifest)

    def _load(self, key: str, verify: bool) -> dict[str, Any]:
        """The manifest of what lies in the place of `key`; a ValueError says what is wrong."""
        place = self.place(key)
        try:
            text = (place / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError("it has no manifest") from None
        manifest = unseal(text, key)
        fault = self.stamps.check(place, key, manifest["files"]) if verify else None
        if fault is not None:
            raise ValueError(fault)
        return manifest

    def manifest(self, key: str) -> dict[str, Any] | None:
        """See `Store.manifest`."""
        path = self.place(key) / MANIFEST
        with storage_errors(path):
            try:
                return unseal(path.read_bytes(), key)
            except (FileNotFoundError, NotADirectoryError, ValueError):
                return None

    def commit(self, key: str, folder: Path, manifest: Mapping[str, Any], lease: Lease) -> Artifact:
        """See `Store.commit`."""
        if lease.key != check_key(key):
            raise StoreError(f"the lease on {lease.key[:12]} is none on {key[:12]}")
        if folder.parent != self.root / "tmp":
            raise StoreError(f"{folder} is no unfinished work of {self!r}")
        try:
            with storage_errors(folder):
                self._check_lease(lease)
                there = self.find(key)
                if there is not None:
                    return there
                made = complete(key, folder, manifest, lease)
                write_durably(folder / MANIFEST, seal(made))
                sync_tree(folder)
                self._check_lease(lease)
                return self.publish(key, folder, made)
        finally:
            self.discard(folder)

    def _check_lease(self, lease: Lease) -> None:
        if lease.lost or not self.leases.holds(lease):
            raise lost_lease(lease)

    def publish(self, key: str, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """The commit point: move a complete folder to the place of `key`, if that is free."""
        place = self.place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                there = self.find(key)  # a damaged one is quarantined, then the place is free
                if there is not None:
                    return there
            else:
                break
        sync_folder(place.parent)
        sync_folder(place.parent.parent)
        return Artifact(place, manifest)

    def entries(self) -> Iterator[dict[str, Any]]:
        """See `Store.entries`."""
        for key in self.all_keys():
            manifest = self.manifest(key)
            if manifest is not None:
                yield manifest

    def all_keys(self) -> list[str]:
        """The keys that have a folder in their place, in order."""
        places = (self.root / "artifacts").glob("[0-9a-f][0-9a-f]/*")
        return sorted(p.name for p in places if len(p.name) == 64 and p == self.place(p.name))

    def verify(self, key: str | None = None) -> list[dict[str, str]]:
        """See `Store.verify`. What was hashed before is hashed again."""
        problems = []
        for one in self.all_keys() if key is None else [check_key(key)]:
            self.stamps.forget(one)
            manifest = self.manifest(one) or {}
            if not self.place(one).exists():
                problems.append({"key": one, "step": "", "reason": "there is no such artifact"})
            elif self.find(one) is None:
                reason = next(
                    (row["reason"] for row in reversed(self.quarantined()) if row["key"] == one),
                    "it was removed meanwhile",
                )
                step = str(manifest.get("step", ""))
                problems.append({"key": one, "step": step, "reason": reason})
        return problems

    def quarantined(self) -> list[dict[str, Any]]:
        """See `Store.quarantined`."""
        rows = []
        for path in (self.root / "quarantine").glob("*.json"):
            row = read_json(path)
            if isinstance(row, dict):
                rows.append({**row, "path": str(path.with_suffix(""))})
        return sorted(rows, key=lambda row: (str(row.get("found")), row["path"]))

    def gc(
        self,
        keep: set[str] | None = None,
        *,
        older_than: float = 0.0,
        dry_run: bool = False,
        grace: float = 24 * 3600.0,
    ) -> list[dict[str, Any]]:
        """See `Store.gc`."""
        with storage_errors(self.root):
            return store_maintenance.collect(
                self, keep, older_than=older_than, dry_run=dry_run, grace=grace
            )

    def _refuse(self, key: str, identity: int, reason: str) -> None:
        """Move a damaged artifact to the quarantine, the reason beside it.

        `identity` is the inode of what was judged: if another process has quarantined it already
        and put a good one in its place, the good one goes back.
        """
        self.stamps.forget(key)
        found = datetime.now(UTC)
        name = f"{key}.{found:%Y%m%dT%H%M%S%f}.{secrets.token_hex(4)}"
        away = self.root / "quarantine" / name
        away.parent.mkdir(parents=True, exist_ok=True)
        note = away.with_name(f"{name}.json")
        row = {"key": key, "reason": reason, "found": found.isoformat(timespec="milliseconds")}
        try:
            write_durably(note, (json.dumps(row, sort_keys=True) + "\n").encode())
            self.place(key).rename(away)
        except FileNotFoundError:
            note.unlink(missing_ok=True)
            return
        except OSError:
            note.unlink(missing_ok=True)
            raise
        if away.stat().st_ino != identity:
            note.unlink(missing_ok=True)
            if not self.place(key).exists():
                away.rename(self.place(key))


def _inode(place: Path) -> int | None:
    """What tells this occupant of an artifact's place from the next; None if there is none.

    An empty folder is no occupant: a rename replaces it.
    """
    try:
        occupied = not place.is_dir() or any(place.iterdir())
        return place.stat().st_ino if occupied else None
    except FileNotFoundError:
        return None

"""The store in a bucket, which has no rename: an artifact appears by one put of its manifest.

    artifacts/<2 digits>/<key>/<attempt>/<member>   uploaded first, under this attempt
    artifacts/<2 digits>/<key>/<attempt>.json       the sealed manifest: the commit point
    leases/, quarantine/, runs/                      as in a folder

An attempt is named `<fence>-<nonce>`; where several have a manifest, the largest fence counts. So a
writer that lost its lease and puts its manifest late, after all checks, changes nothing: its fence
is smaller. Readers download into a local store, this host's cache, and verify on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from goldcrest.cluster import store_maintenance
from goldcrest.cluster.artifact import MANIFEST, Artifact, safe_member
from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.lease import Lease, lost_lease
from goldcrest.cluster.lease_remote import BucketLeases
from goldcrest.cluster.store import (
    RECORD,
    Store,
    check_key,
    parse_record,
    storage_errors,
    workplace_name,
)
from goldcrest.cluster.store_bucket import Bucket
from goldcrest.cluster.store_local import LocalStore
from goldcrest.cluster.store_manifest import complete, seal, unseal, write_durably

_ATTEMPT = re.compile(r"\d{12}-[0-9a-f]{16}")
_AGREED = ".agreed"  # in the folder of a run's record: which one of the bucket it is
_COMMIT = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})/(\d{12}-[0-9a-f]{16})\.json")


class RemoteStore(Store):
    """A store in a bucket, with a local store as cache and workplace."""

    leases: BucketLeases
    shared_paths = False  # they lie in this host's cache

    def __init__(self, uri: str, bucket: Bucket, cache: Path) -> None:
        self.uri = uri
        self.root = cache
        self.bucket = bucket
        self.cache = LocalStore(cache)
        self.leases = BucketLeases(bucket, self._largest_fence)

    @classmethod
    def at(cls, uri: str) -> RemoteStore:
        """The store at `uri`; its cache is below $GOLDCREST_CACHE, else ~/.cache/goldcrest."""
        name = hashlib.sha256(uri.encode()).hexdigest()[:16]
        with storage_errors(uri):
            return cls(uri, Bucket.at(uri), _cache_root() / name)

    def find(self, key: str, *, verify: bool = True) -> Artifact | None:
        """See `Store.find`. Downloads what this host does not have."""
        check_key(key)
        with storage_errors(self.uri):
            while (attempt := self._newest(key)) is not None:
                try:
                    manifest = self._read(key, attempt)
                    if manifest is not None:
                        return self._cached(key, manifest, verify) or self._fetch(key, manifest)
                except ValueError as fault:
                    self._refuse(key, attempt, str(fault))
        return None

    def manifest(self, key: str) -> dict[str, Any] | None:
        """See `Store.manifest`."""
        with storage_errors(self.uri):
            attempt = self._newest(check_key(key))
            try:
                return self._read(key, attempt) if attempt is not None else None
            except ValueError:
                return None

    def commit(self, key: str, folder: Path, manifest: Mapping[str, Any], lease: Lease) -> Artifact:
        """See `Store.commit`."""
        if lease.key != check_key(key):
            raise StoreError(f"the lease on {lease.key[:12]} is none on {key[:12]}")
        if folder.parent != self.root / "tmp":
            raise StoreError(f"{folder} is no unfinished work of {self!r}")
        try:
            with storage_errors(self.uri):
                self._check_lease(lease)
                there = self.find(key)
                if there is not None:
                    return there
                made = complete(key, folder, manifest, lease)
                sealed = seal(made)
                for name in made["files"]:
                    self.bucket.upload(folder / name, f"{_place(key)}/{lease.attempt}/{name}")
                self._check_lease(lease)
                self.bucket.put(f"{_place(key)}/{lease.attempt}.json", sealed)
                write_durably(folder / MANIFEST, sealed)
                if self._newest(key) == lease.attempt:
                    return self._install(key, folder, made)
            found = self.find(key)
            if found is None:
                raise StoreError(f"the artifact {key[:12]} was removed while it was committed")
            return found
        finally:
            self.discard(folder)

    def entries(self) -> Iterator[dict[str, Any]]:
        """See `Store.entries`."""
        for key in self.committed():
            manifest = self.manifest(key)
            if manifest is not None:
                yield manifest

    def verify(self, key: str | None = None) -> list[dict[str, str]]:
        """See `Store.verify`. Reads every byte of the bucket, and every one of this host's copy.

        Both, as a rotten copy whose time stamps have not changed would be found again and again.
        """
        problems = []
        for one in sorted(self.committed()) if key is None else [check_key(key)]:
            attempt = self._newest(one)
            if attempt is None:
                problems.append({"key": one, "step": "", "reason": "there is no such artifact"})
                continue
            step = ""
            try:
                manifest = self._read(one, attempt) or {"files": {}}
                step = str(manifest.get("step", ""))
                for name, facts in manifest["files"].items():
                    self._download(f"{_place(one)}/{attempt}/{name}", facts, None)
            except ValueError as fault:
                self._refuse(one, attempt, str(fault))
                problems.append({"key": one, "step": step, "reason": str(fault)})
            if self.cache.place(one).exists():
                for row in self.cache.verify(one):
                    problems.append({**row, "reason": f"this host's copy: {row['reason']}"})
        return problems

    def quarantined(self) -> list[dict[str, Any]]:
        """See `Store.quarantined`. `note` is the object that holds the row."""
        rows = []
        for name in self.bucket.names("quarantine"):
            text = self.bucket.get(f"quarantine/{name}")
            try:
                row = json.loads(text or b"null")
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append({**row, "note": f"quarantine/{name}"})
        return sorted(rows, key=lambda row: str(row.get("found")))

    def run_folder(self, run_id: str) -> Path:
        """See `Store.run_folder`. What another host wrote there last is fetched first."""
        folder = super().run_folder(run_id)
        with storage_errors(folder):
            written = self.bucket.times(f"runs/{run_id}", recursive=True)
            newer = written.get(RECORD, 0.0) > _agreed(folder)
            cut_short = RECORD in written and not (folder / RECORD).is_file()
            if newer or cut_short or not any(folder.iterdir()):
                for name in sorted(written, key=lambda name: name == RECORD):
                    if not name.endswith(".part"):
                        target = folder / safe_member(name)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(self.bucket.get(f"runs/{run_id}/{name}") or b"")
                _agree(folder, written)
        return folder

    def publish_run(self, run_id: str) -> None:
        """See `Store.publish_run`. `run.json` comes last: who sees it sees the rest."""
        folder = super().run_folder(run_id)  # ours as it is, not what the bucket has
        with storage_errors(self.uri):
            for path in sorted(folder.rglob("*"), key=lambda path: (path.name == RECORD, path)):
                if path.is_file() and not path.name.startswith("."):
                    name = path.relative_to(folder).as_posix()
                    self.bucket.put(f"runs/{run_id}/{name}", path.read_bytes())
            _agree(folder, self.bucket.times(f"runs/{run_id}"))

    def run_records(self, run_id: str) -> list[dict[str, Any]]:
        """See `Store.run_records`."""
        own = super().run_records(run_id)
        name = f"runs/{run_id}/{RECORD}"
        with storage_errors(self.uri):
            return own + parse_record(self.bucket.get(name), f"{self.uri}: {name}")

    def _run_times(self) -> dict[str, float]:
        found = super()._run_times()
        with storage_errors(self.uri):
            for name, written in self.bucket.times("runs", recursive=True).items():
                run, _, member = name.partition("/")
                if member == RECORD:
                    found[run] = max(written, found.get(run, 0.0))
        return found

    def gc(
        self,
        keep: set[str] | None = None,
        *,
        older_than: float = 0.0,
        dry_run: bool = False,
        grace: float = 24 * 3600.0,
    ) -> list[dict[str, Any]]:
        """See `Store.gc`. Ages are measured by the bucket's own clock."""
        from goldcrest.cluster.store_remote_maintenance import collect

        with storage_errors(self.uri):
            rows = store_maintenance.collect(
                self.cache, keep, older_than=older_than, dry_run=dry_run, grace=grace, owner=self
            )
            return rows + collect(self, keep, older_than=older_than, dry_run=dry_run, grace=grace)

    def _check_lease(self, lease: Lease) -> None:
        if lease.lost or not self.leases.holds(lease):
            raise lost_lease(lease)

    def committed(self) -> dict[str, str]:
        """Every committed key with its newest attempt, by one listing."""
        found = (_COMMIT.fullmatch(n) for n in self.bucket.names("artifacts", recursive=True))
        return {match[1]: match[2] for match in found if match is not None}

    def _newest(self, key: str) -> str | None:
        """The committed attempt with the largest fence."""
        names = (name.removesuffix(".json") for name in self.bucket.names(_place(key)))
        return max((name for name in names if _ATTEMPT.fullmatch(name)), default=None)

    def _largest_fence(self, key: str) -> int:
        """The largest fence among all attempts on `key`, committed or not."""
        names = self.bucket.names(_place(key), recursive=True)
        return max((int(name[:12]) for name in names if _ATTEMPT.match(name)), default=0)

    def _read(self, key: str, attempt: str) -> dict[str, Any] | None:
        """The manifest of an attempt, None if it has gone; a ValueError says what is wrong."""
        text = self.bucket.get(f"{_place(key)}/{attempt}.json")
        return unseal(text, key) if text is not None else None

    def _cached(self, key: str, manifest: Mapping[str, Any], verify: bool) -> Artifact | None:
        """This host's copy, if it is of the same attempt; another one is removed."""
        artifact = self.cache.find(key, verify=verify)
        if artifact is not None and artifact.manifest != manifest:
            store_maintenance.remove(self.cache, artifact.path)
            return None
        return artifact

    def _fetch(self, key: str, manifest: dict[str, Any]) -> Artifact:
        """Download an artifact into the cache; a ValueError says what is wrong with it."""
        nonce = secrets.token_hex(8)
        lease = Lease(key=key, owner="download", fence=0, nonce=nonce, ttl=0.0)
        folder = self.root / "tmp" / workplace_name(key, lease)
        folder.mkdir(parents=True)
        try:
            for name, facts in manifest["files"].items():
                target = folder / safe_member(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._download(f"{_place(key)}/{manifest['attempt']}/{name}", facts, target)
            write_durably(folder / MANIFEST, seal(manifest))
            return self._install(key, folder, manifest)
        finally:
            self.discard(folder)

    def _install(self, key: str, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Make a complete folder this host's copy."""
        while True:
            made = self.cache.publish(key, folder, manifest)
            if made.manifest == manifest:
                return made
            store_maintenance.remove(self.cache, made.path)

    def _download(self, name: str, facts: Mapping[str, Any], target: Path | None) -> None:
        """Read an object, twice if need be, until its size and checksum are right."""
        for _ in range(2):
            digest, size = hashlib.sha256(), 0
            with Path(os.devnull if target is None else target).open("wb") as stream:
                try:
                    for block in self.bucket.blocks(name):
                        digest.update(block)
                        size += len(block)
                        stream.write(block)
                except FileNotFoundError:
                    raise ValueError(f"{name}: missing") from None
            if size == facts["bytes"] and digest.hexdigest() == facts["sha256"]:
                return
        raise ValueError(f"{name}: its size or checksum differs")

    def _refuse(self, key: str, attempt: str, reason: str) -> None:
        """Take a damaged attempt out of service: note the reason, then remove its manifest."""
        found = datetime.now(UTC)
        name = f"{key}.{found:%Y%m%dT%H%M%S%f}.{secrets.token_hex(4)}.json"
        row = {
            "key": key,
            "attempt": attempt,
            "reason": reason,
            "found": found.isoformat(timespec="milliseconds"),
            "path": f"{_place(key)}/{attempt}",
        }
        self.bucket.put(f"quarantine/{name}", json.dumps(row, sort_keys=True).encode())
        self.bucket.delete(f"{_place(key)}/{attempt}.json")


def _agreed(folder: Path) -> float:
    """The bucket's time of the record that `folder` is a copy of.

    Infinite for a record that was never in the bucket: nothing there is newer.
    """
    try:
        return float((folder / _AGREED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return math.inf


def _agree(folder: Path, written: Mapping[str, float]) -> None:
    """Note that `folder` is what the bucket has; `written` are the times of its objects there."""
    when = written.get(RECORD)
    if when is None:
        return
    (folder / _AGREED).write_text(repr(when), encoding="utf-8")
    if when and (folder / RECORD).is_file():  # `runs` orders by it: to fetch makes no run newer
        os.utime(folder / RECORD, (when, when))


def _place(key: str) -> str:
    return f"artifacts/{key[:2]}/{key}"


def _cache_root() -> Path:
    own = os.environ.get("GOLDCREST_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "goldcrest"

"""Garbage of a store in a bucket: attempts without a manifest, claims of the dead, old artifacts.

An attempt belongs to the claim with its nonce. It goes only when that claim is gone or fenced off
and nothing in it was written for the grace time, measured by the bucket's own clock.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from goldcrest.cluster import store_maintenance
from goldcrest.cluster.shared_store import SEEN

if TYPE_CHECKING:
    from goldcrest.cluster.store_remote import RemoteStore

_MEMBER = re.compile(
    r"[0-9a-f]{2}/([0-9a-f]{64})/(\d{12}-[0-9a-f]{16})(\.json(?:\.\w+\.part)?|/.+)"
)
_SILENT = 3600.0  # a holder's claim is rewritten every few seconds; one this old has no holder


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Objects that go together."""

    what: str
    key: str
    path: str
    names: list[str]  # in the order of removal
    reason: str


def collect(
    store: RemoteStore,
    keep: set[str] | None,
    *,
    older_than: float,
    dry_run: bool,
    grace: float,
) -> list[dict[str, Any]]:
    """Remove (or only list) all garbage of a bucket. Arguments and rows as in `Store.gc`."""
    now = store.bucket.now()
    found = [
        *_attempts(store, keep, now, older_than, grace),
        *_claims(store, now, grace),
        *_half_written(store, now, grace),
    ]
    rows = []
    for group in found:
        size = sum(store.bucket.size(name) for name in group.names)
        if not dry_run:
            for name in group.names:
                store.bucket.delete(name)
            if group.what == "artifact":
                store_maintenance.remove(store.cache, store.cache.place(group.key))
        rows.append({"what": group.what, "path": group.path, "bytes": size, "reason": group.reason})
    return rows


def _attempts(
    store: RemoteStore, keep: set[str] | None, now: float, older_than: float, grace: float
) -> Iterator[Garbage]:
    """Attempts that no reader will ever look at, and with `keep` those that are not kept."""
    notes = {row["path"]: row["note"] for row in store.quarantined()}
    newest = store.committed()
    for (key, attempt), objects in _objects(store).items():
        path = f"artifacts/{key[:2]}/{key}/{attempt}"
        # The manifest first: from then on the attempt does not exist for readers.
        names = sorted(objects, key=lambda name: name != f"{path}.json")
        age = now - max(objects.values())
        unwanted = keep is not None and key not in keep and age >= older_than
        if newest.get(key) == attempt:
            what, reason = "artifact", "it is not kept"
            garbage = unwanted and not store.leases.held(key)
        elif path in notes:
            what, reason, garbage = "quarantined", "it is damaged", unwanted
            names.append(notes[path])
        else:
            what, reason = "unfinished work", "its writer is gone"
            garbage = age >= grace and not store.leases.stands(key, attempt[13:])
        if garbage:
            yield Garbage(what=what, key=key, path=path, names=names, reason=reason)


def _objects(store: RemoteStore) -> dict[tuple[str, str], dict[str, float]]:
    """(key, attempt) -> {object: time of writing} of all attempts in the bucket."""
    objects: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for name, written in store.bucket.times("artifacts", recursive=True).items():
        match = _MEMBER.fullmatch(name)
        if match is not None:
            objects[match[1], match[2]][f"artifacts/{name}"] = written
    return objects


def _claims(store: RemoteStore, now: float, grace: float) -> Iterator[Garbage]:
    """Claims and tombstones of contenders that are gone, after a time in which all have noticed."""
    for name, written in store.bucket.times("leases", recursive=True).items():
        key, _, file = name.rpartition("/")
        nonce, _, kind = file.partition(".")
        gone = kind != "json" or not store.leases.stands(key, nonce)
        age = now - written
        if (gone and age >= grace) or age >= max(grace, _SILENT):
            path = f"leases/{name}"
            yield Garbage(
                what="lease", key=key, path=path, names=[path], reason="its owner is gone"
            )


def _half_written(store: RemoteStore, now: float, grace: float) -> Iterator[Garbage]:
    """What a `put`, a look at the clock or a proof of sight left when its process died."""
    for folder, passing in (("clock", True), (SEEN, True), ("quarantine", False), ("runs", False)):
        for name, written in store.bucket.times(folder, recursive=True).items():
            if (passing or name.endswith(".part")) and now - written >= grace:
                path = f"{folder}/{name}"
                yield Garbage(
                    what="half-written",
                    key="",
                    path=path,
                    names=[path],
                    reason="its writer is gone",
                )

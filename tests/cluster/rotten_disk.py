"""A disk that rots, for the tests of stores: bits change and no time stamp tells."""

from __future__ import annotations

import json
import time

from goldcrest.cluster import store_stamps
from goldcrest.cluster.store_local import LocalStore


def rot(store: LocalStore, key: str, name: str) -> None:
    """Flip a bit of a member of a verified artifact; its stamp stays right."""
    place = store.place(key)
    content = (place / name).read_bytes()
    (place / name).chmod(0o644)
    (place / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    manifest = store.manifest(key)
    assert manifest is not None
    files = {member: store_stamps._stamp(place / member) for member in manifest["files"]}
    store.stamps.folder.mkdir(parents=True, exist_ok=True)
    note = {"at": time.time(), "files": files}
    (store.stamps.folder / f"{key}.json").write_text(json.dumps(note))

"""Remember which files were verified, so that an untouched file is not hashed again and again.

A file that was hashed and found good gets a *stamp*: device, inode, size, modification time and
change time. As long as all five are the same, no program on this host has written to the file: the
change time can't be set back by `utime`, unlike the modification time. Two cases would break that
reasoning, and both are excluded:

* a write within the same tick of the clock as the hashing leaves the times as they were, so a file
  is stamped only when its change time is at least two seconds old before it is hashed;
* a disk that rots changes bits and no times, so a stamp is believed for a week at most, and
  `Artifact.file` hashes what a step really reads in any case.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from goldcrest.cluster.artifact import sha256_file

SETTLED_NS = 2_000_000_000  # age of a change time from which a later write must show
BELIEVED_SECONDS = 7 * 24 * 3600.0


class Stamps:
    """The stamps of one host, one file per artifact, in `folder`. Losing them costs only time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, root: Path, key: str, files: Mapping[str, Mapping[str, Any]]) -> str | None:
        """What is wrong with the members `files` of the artifact at `root`, None if nothing is.

        `files` is the manifest's `{name: {"bytes", "sha256"}}`.
        """
        known = self._read(key)
        stamps: dict[str, list[int]] = {}
        news = False
        for name, facts in files.items():
            path = root / name
            try:
                stamp = _stamp(path)
            except OSError as error:
                return f"{name}: {error.strerror or error}"
            if stamp is None:
                return f"{name}: not a regular file"
            if stamp[2] != facts["bytes"]:
                return f"{name}: {stamp[2]} bytes instead of {facts['bytes']}"
            if known.get(name) != stamp:
                settled = time.time_ns() - stamp[4] > SETTLED_NS
                if sha256_file(path) != facts["sha256"]:
                    return f"{name}: its checksum differs"
                if not settled or _stamp(path) != stamp:
                    continue
                news = True
            stamps[name] = stamp
        if news:
            self._write(key, stamps)
        return None

    def forget(self, key: str) -> None:
        """Drop what is known about an artifact."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str) -> dict[str, list[int]]:
        try:
            value = json.loads(self._path(key).read_bytes())
            fresh = 0 <= time.time() - value["at"] < BELIEVED_SECONDS
            return dict(value["files"]) if fresh else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, key: str, stamps: Mapping[str, list[int]]) -> None:
        path = self._path(key)
        part = path.with_name(f"{key}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"at": time.time(), "files": stamps}))
            part.replace(path)
        except OSError:  # a full or read-only disk: the next reader hashes again
            part.unlink(missing_ok=True)


def _stamp(path: Path) -> list[int] | None:
    """[device, inode, bytes, modified ns, changed ns], None if it is no regular file.

    Opened, not just looked at: on NFS that asks the server instead of a cache.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        return None
    with path.open("rb") as stream:
        seen = os.fstat(stream.fileno())
    return [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]

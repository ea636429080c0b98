"""Manifests: the list of an artifact's files and facts, sealed so that damage to it shows.

`seal` is the SHA-256 of the manifest's canonical JSON without the seal. Together with the checksum
of every member it makes each bit of an artifact count: a flipped digit in a metric is found like a
flipped bit in a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from goldcrest.cluster.artifact import MANIFEST, describe_files, safe_member
from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.lease import Lease

SCHEMA = 1


def complete(key: str, folder: Path, manifest: Mapping[str, Any], lease: Lease) -> dict[str, Any]:
    """`manifest` with everything that the store knows: key, files, fence, time.

    Every file of `folder` is hashed and on the disk afterwards. StoreError for a folder that holds
    anything but plain files, or a manifest made for another key.
    """
    if manifest.get("key", key) != key:
        raise StoreError(f"the manifest of {manifest['key']} was given for the key {key}")
    _check_folder(folder)
    return {
        "schema": SCHEMA,
        "step": "",
        "task": "",
        "inputs": {},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **manifest,
        "key": key,
        "fence": lease.fence,
        "attempt": lease.attempt,
        "files": describe_files(folder),
    }


def _check_folder(folder: Path) -> None:
    """Only folders and regular files with plain names: a link could lead anywhere later on."""
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder} to commit")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"'{name}' is a link or a special file; artifacts hold plain files")
        try:
            safe_member(name).as_posix().encode()
        except ValueError as error:
            raise StoreError(f"{name!r} can't be a member of an artifact: {error}") from None
        if name == MANIFEST:
            raise StoreError(f"the step wrote '{MANIFEST}': that name belongs to the store")


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes with its seal; StoreError if it holds what JSON can't."""
    plain = {name: value for name, value in manifest.items() if name != "seal"}
    try:
        sealed = {**plain, "seal": _seal_of(plain)}
        text = json.dumps(sealed, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"the manifest is not JSON: {error}") from None


def unseal(text: bytes, key: str) -> dict[str, Any]:
    """The manifest in `text`; a ValueError that says what is wrong with it."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the manifest is not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not a mapping")
    claimed = manifest.pop("seal", None)
    try:
        if claimed != _seal_of(manifest):
            raise ValueError("the manifest's seal is broken: it was changed after it was written")
    except UnicodeEncodeError:
        raise ValueError("the manifest holds text that is no Unicode") from None
    if manifest.get("key") != key:
        raise ValueError(f"the manifest belongs to the key {manifest.get('key')}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError("the manifest lists no files")
    for name, facts in files.items():
        safe_member(name)
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ValueError(f"the manifest does not describe '{name}'")
    return manifest


def _seal_of(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(
        manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until the entries of a folder and of all folders in it are on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)

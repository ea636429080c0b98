"""The artifact store: results under the hash of what made them, complete and verified or absent.

    <root>/artifacts/<2 digits>/<key>/   members and manifest.json, which is written last
    <root>/tmp/                          unfinished work, one folder per attempt
    <root>/leases/<key>/                 who computes what (lease.py)
    <root>/scratch/<key>/                checkpoints; survive a kill
    <root>/runs/<run>/                   run records: run.json, events, report
    <root>/quarantine/                   damaged artifacts, each with its reason
    <root>/verified/<machine>/           what was hashed already (store_stamps.py)

`Store.open` gives a `LocalStore` (store_local.py) for a path and a `RemoteStore` (store_remote.py)
for the URI of a bucket. How a step uses it:

    with store.lease(key, owner="features of run 7") as lease:
        artifact = store.find(key)                   # another may have been faster
        if artifact is None:
            folder = store.begin(key, lease)         # write members here
            artifact = store.commit(key, folder, manifest, lease)
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from goldcrest.cluster.artifact import Artifact
from goldcrest.cluster.errors import InputError, StoreError
from goldcrest.cluster.lease import Lease, LeaseBook, hold
from goldcrest.cluster.masking import mask_text
from goldcrest.cluster.process_id import ProcessId

RECORD = "run.json"  # what makes a folder below runs/ the record of a run
_KEY = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_REMEDIES = {
    errno.ENOSPC: "free space (`goldcrest artifacts gc` helps) or choose another --store",
    errno.EDQUOT: "free space (`goldcrest artifacts gc` helps) or choose another --store",
    errno.EACCES: "check who owns the folder, or choose another --store",
    errno.EPERM: "check who owns the folder and that its file system has hard links",
    errno.EROFS: "the file system is read-only: choose another --store",
    errno.ENOTDIR: "a file is in the way of a folder: remove it, or choose another --store",
    errno.EXDEV: "the folders of a store must lie on one file system: don't link them elsewhere",
    errno.EMLINK: "the file system has no hard links: use the URI of its bucket instead",
    errno.EOPNOTSUPP: "the file system has no hard links: use the URI of its bucket instead",
}


def storage_error(error: OSError, path: Path | str) -> StoreError | None:
    """`error` as a sentence with path and remedy, None where trying again may help (I/O errors)."""
    number = error.errno or (errno.EACCES if isinstance(error, PermissionError) else 0)
    remedy = _REMEDIES.get(number)
    if remedy is None:
        return None
    where = mask_text(str(error.filename or path))
    reason = os.strerror(number)
    return StoreError(f"the store can't be used at {where}: {reason}", hint=remedy)


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn errors of the disk that no repetition mends into `StoreError`."""
    try:
        yield
    except OSError as error:
        told = storage_error(error, path)
        if told is None:
            raise
        raise told from error


def check_key(key: str) -> str:
    """`key` if it is 64 lower-case hex digits, else a StoreError: keys become paths."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} is not a key: a key has 64 hex digits")
    return key


class Store(ABC):
    """What all stores can do. Open one with `Store.open`; it travels to workers as its URI.

    The working folders (unfinished work, scratch, run records) are always local, under `root`: the
    store itself if that is a path, else this host's cache of it.
    """

    uri: str
    root: Path
    leases: LeaseBook
    shared_paths: bool
    """Whether a path below `root` is the same file on every node that sees the store."""

    @classmethod
    def open(cls, uri: str | Path) -> Store:
        """The store at a local path, `file://`, `s3://`, `gs://`, or any pyarrow or fsspec URI.

        Raises StoreError where it can't be written to, InputError where the URI means nothing.
        """
        text = str(uri)
        if not text.strip():
            raise InputError("the store's path is empty", hint="give --store a folder or a URI")
        if isinstance(uri, Path) or not _SCHEME.match(text):
            return _open_local(Path(text))
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise InputError(
                f"'{mask_text(text)}' is no URI: {error}", hint="give a folder or a URI"
            ) from None
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost"):
                raise InputError(
                    f"'{mask_text(text)}' names the host '{parts.hostname}'",
                    hint="write it as file:///folder",
                )
            return _open_local(Path(unquote(parts.path)))
        from goldcrest.cluster.store_remote import RemoteStore

        return RemoteStore.at(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.open, (self.uri,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({mask_text(self.uri)!r})"

    @abstractmethod
    def find(self, key: str, *, verify: bool = True) -> Artifact | None:
        """The artifact of `key`, every member verified; None if there is none.

        A damaged one is quarantined with its reason and counts as none. `verify=False` trusts what
        lies there.
        """

    @abstractmethod
    def manifest(self, key: str) -> dict[str, Any] | None:
        """The manifest of `key` without a look at the members; None if absent or damaged."""

    @abstractmethod
    def commit(self, key: str, folder: Path, manifest: Mapping[str, Any], lease: Lease) -> Artifact:
        """Make `folder` the artifact of `key`, at once and completely, or not at all.

        Fills in `key`, `files`, `fence`, `created`. Whatever happens, `folder` is used up. A valid
        artifact that is already there wins. A lost lease is refused with a StoreError.
        """

    @abstractmethod
    def entries(self) -> Iterator[dict[str, Any]]:
        """The manifests of all artifacts, ordered by key."""

    @abstractmethod
    def verify(self, key: str | None = None) -> list[dict[str, str]]:
        """Hash every byte of one artifact or of all; quarantine and list what is damaged.

        Rows are {"key", "step", "reason"}.
        """

    @abstractmethod
    def quarantined(self) -> list[dict[str, Any]]:
        """What was found damaged: rows of {"key", "reason", "found", "path"}, oldest first."""

    @abstractmethod
    def gc(
        self,
        keep: set[str] | None = None,
        *,
        older_than: float = 0.0,
        dry_run: bool = False,
        grace: float = 24 * 3600.0,
    ) -> list[dict[str, Any]]:
        """Remove what nobody needs; rows of {"what", "path", "bytes", "reason"} say what went.

        Always: unfinished work of dead writers (beside run records too), old leases, scratch of
        committed keys. Only when `keep` is given, and of keys not in it: artifacts older than
        `older_than` seconds (a bucket's, and this host's copies), and scratch older than that and
        than `grace` whose step never was committed. What another host may still be using stays for
        `grace` seconds. A live writer's things are never touched, nor are the records of runs.
        """

    def lease(
        self,
        key: str,
        *,
        owner: str,
        ttl: float = 60.0,
        wait: Callable[[str], None] | None = None,
    ) -> AbstractContextManager[Lease]:
        """The sole right to compute `key`; blocks while a live other has it.

        `owner` names us to others; `wait(note)` is called now and then while blocked; `ttl` is the
        silence in seconds after which a holder on another host counts as gone.
        """
        return self._lease(check_key(key), owner, ttl, wait)

    @contextmanager
    def _lease(
        self, key: str, owner: str, ttl: float, wait: Callable[[str], None] | None
    ) -> Iterator[Lease]:
        holding = hold(self.leases, key, owner=owner, ttl=ttl, wait=wait)
        with storage_errors(self.uri):
            lease = holding.__enter__()
        try:
            yield lease
        finally:
            with storage_errors(self.uri):
                holding.__exit__(None, None, None)

    def begin(self, key: str, lease: Lease) -> Path:
        """A new empty folder for the members of `key`, on the same disk as their final place."""
        name = workplace_name(check_key(key), lease)
        folder = self.root / "tmp" / name
        with storage_errors(folder):
            folder.mkdir(parents=True)
        return folder

    def discard(self, folder: Path) -> None:
        """Remove an unfinished folder that `begin` gave; nothing happens if it has gone."""
        if folder.parent != self.root / "tmp":
            raise StoreError(f"{folder} is no unfinished work of {self!r}")
        with storage_errors(folder):
            remove_tree(folder)

    def scratch(self, key: str) -> Path:
        """A folder for checkpoints of `key` that survives a kill and other attempts."""
        folder = self.root / "scratch" / check_key(key)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_scratch(self, key: str) -> None:
        """Remove the scratch folder of `key`, if there is one."""
        folder = self.root / "scratch" / check_key(key)
        with storage_errors(folder):
            remove_tree(folder)

    @property
    def runs_folder(self) -> Path:
        """Where run records live, one folder per run."""
        folder = self.root / "runs"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run_folder(self, run_id: str) -> Path:
        """The folder of one run's record, made if need be."""
        folder = self.runs_folder / _run_name(run_id)
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def runs(self) -> list[str]:
        """The runs that the store has records of, oldest first; in a bucket those of every host."""
        times = self._run_times()
        return sorted(times, key=lambda name: (times[name], name))

    def _run_times(self) -> dict[str, float]:
        """When the record of each run was written last."""
        found = {}
        with storage_errors(self.runs_folder):
            for path in self.runs_folder.glob(f"*/{RECORD}"):
                with suppress(FileNotFoundError):
                    found[path.parent.name] = path.stat().st_mtime
        return {name: written for name, written in found.items() if _RUN.fullmatch(name)}

    def run_records(self, run_id: str) -> list[dict[str, Any]]:
        """What the record of a run says, each copy of it that there is.

        A bucket's copy and this host's may differ: who decides what to keep must heed both. Raises
        StoreError for one that is damaged.
        """
        path = self.runs_folder / _run_name(run_id) / RECORD
        with storage_errors(path):
            return parse_record(path.read_bytes() if path.is_file() else None, str(path))

    def publish_run(self, run_id: str) -> None:
        """Copy a run's record to where others find it; nothing to do where the store is a path."""
        self.run_folder(run_id)

    def lineage(self, key: str) -> dict[str, Any]:
        """The tree of what made `key`: {"key", "step", "task", "inputs": {parameter: tree}}.

        An input that the store no longer has is {"key", "missing": True}. A key met twice is the
        same object twice.
        """
        return self._lineage(check_key(key), {})

    def _lineage(self, key: str, met: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if key in met:
            return met[key]
        manifest = self.manifest(key)
        if manifest is None:
            met[key] = {"key": key, "missing": True}
            return met[key]
        inputs: dict[str, Any] = {}
        facts = {name: manifest.get(name) for name in ("step", "task", "created", "seconds")}
        tree = met[key] = {"key": key, **facts, "inputs": inputs}
        for parameter, made in manifest.get("inputs", {}).items():
            inputs[parameter] = self._lineage(check_key(made), met) if made else None
        return tree


def _run_name(run_id: str) -> str:
    if not _RUN.fullmatch(run_id):
        raise StoreError(f"{run_id!r} is not the name of a run")
    return run_id


def parse_record(text: bytes | None, where: str) -> list[dict[str, Any]]:
    """The record in `text` as a list of one, of none where there is no text."""
    if text is None:
        return []
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StoreError(
            f"the record {mask_text(where)} cannot be read", hint="remove it, or write it anew"
        )
    return [record]


def _open_local(path: Path) -> Store:
    from goldcrest.cluster.store_local import LocalStore

    return LocalStore(Path(os.path.abspath(path.expanduser())))  # noqa: PTH100 - keeps links


def workplace_name(key: str, lease: Lease) -> str:
    """Name of an attempt's folder: whose work it is can be told even if it is empty."""
    me = ProcessId.current()
    return f"{key}.{lease.attempt}.{me.machine}-{me.pid}-{me.started or 0}"


_WORKPLACE = re.compile(
    r"([0-9a-f]{64})\.(\d{12}-[0-9a-f]{16})\.([0-9a-f]{16})-(\d+)-(\d+(?:\.\d+)?)"
)


def workplace_facts(name: str) -> tuple[str, str, ProcessId] | None:
    """Key, attempt and writer of an attempt's folder, None for a name of another kind."""
    match = _WORKPLACE.fullmatch(name)
    if match is None:
        return None
    key, attempt, machine, pid, started = match.groups()
    started = "" if started == "0" else started
    return key, attempt, ProcessId(host="", machine=machine, pid=int(pid), started=started)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it; what another process removes meanwhile is no error."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue


def read_json(path: Path) -> Any:
    """The JSON value in a file, None if it is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None

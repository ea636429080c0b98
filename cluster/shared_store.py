"""Before a run on several nodes: does every one of them see the same store?

A store that only looks shared (a folder that exists on each node, a mount that one node lacks, a
bucket that one may not read) would cost hours before it shows: a step would not find what another
one wrote. So the driver writes a nonce, every node reads it and writes an answer, and the driver
reads the answers. A node that fails any of this is named, and no step starts.

The run's folder needs no sharing for results, but live progress, the steps' logs and their timeouts
go through it. With a store in a bucket it is a folder of the driver's machine: steps on other nodes
are then seen only when they end, a timeout of theirs is not enforced, and the run says so.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.masking import mask_text
from goldcrest.cluster.process_id import ProcessId
from goldcrest.cluster.store import Store

if TYPE_CHECKING:
    from goldcrest.cluster.store_bucket import Bucket

_PATIENCE = 10.0
"""Seconds that a file may take to appear elsewhere: network file systems cache folders."""
SEEN = "seen"  # folder of a bucket with the notes; what is old there was left by the dead
_ANSWER = 120.0  # seconds that a node may take to answer at all; its worker must start first


@dataclass(frozen=True, kw_only=True)
class View:
    """What one node sees. `problem` is why it does not see the store, "" where it does."""

    node: str
    problem: str
    sees_run: bool


class _Wall:
    """Where notes are left for other nodes: a folder of the store, or the store's bucket."""

    def __init__(self, folder: Path, bucket: Bucket | None, name: str) -> None:
        self._folder = folder
        self._bucket = bucket
        self._name = name

    def _object(self, note: str) -> str:
        return f"{SEEN}/{self._name}/{note}"

    def write(self, note: str, text: str) -> None:
        """Leave a note. The folder is never made: a node that lacks it must not seem to have it."""
        if self._bucket is not None:
            self._bucket.put(self._object(note), text.encode())
        else:
            (self._folder / f".{self._name}-{note}").write_text(text, encoding="utf-8")

    def read(self, note: str) -> str | None:
        """The note, None if there is none."""
        if self._bucket is not None:
            found = self._bucket.get(self._object(note))
            return None if found is None else found.decode(errors="replace")
        try:
            return (self._folder / f".{self._name}-{note}").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def wait(self, note: str, text: str) -> bool:
        """Whether the note reads `text`, now or soon."""
        limit = time.monotonic() + _PATIENCE
        while self.read(note) != text:
            if time.monotonic() >= limit:
                return False
            time.sleep(0.2)
        return True

    def remove(self, note: str) -> None:
        """Take the note away, if it is there."""
        if self._bucket is not None:
            self._bucket.delete(self._object(note))
        else:
            (self._folder / f".{self._name}-{note}").unlink(missing_ok=True)


def look(node: str, uri: str, folder: Path, name: str, nonce: str) -> View:
    """What this process, on `node`, sees of the notes that the driver left. Runs as a Ray task."""
    try:
        bucket = _bucket(uri)
        wall = _Wall(folder, bucket, name)
        if not wall.wait("nonce", nonce):
            found = "it lacks what was written there a moment ago"
            problem = found if bucket or folder.is_dir() else f"it has no folder {folder}"
        else:
            wall.write(node, nonce)
            problem = ""
    except (OSError, GoldcrestError) as error:
        problem = f"{type(error).__name__}: {mask_text(str(error))}"
    sees_run = (folder / f".{name}-run").is_file()
    return View(node=node, problem=problem, sees_run=sees_run)


def prove_shared(store: Store, folder: Path) -> list[str]:
    """Make sure that every node sees `store`; the nodes that do not see the run's `folder`.

    A node that is lost meanwhile is no node of the run and has no say. Raises InputError that names
    the nodes that don't see the store, and why.
    """
    names = _living_nodes()
    if len(names) < 2:
        return []
    me = ProcessId.current().mark  # gc can tell whose notes they are
    name, nonce = f"seen-{secrets.token_hex(8)}.{me}", secrets.token_hex(16)
    wall = _Wall(folder, _bucket(store.uri), name)
    with _notes(wall, folder, name, nonce, list(names)):
        views = _ask_all(list(names), store.uri, folder, name, nonce)
        living = _living_nodes()
        views = [view for view in views if view.node in living]
        problems = {
            view.node: view.problem
            or ("" if wall.wait(view.node, nonce) else "what it writes there is not seen here")
            for view in views
        }
    blind = [f"{names[node]}: {problem}" for node, problem in problems.items() if problem]
    if blind:
        raise InputError(
            f"{len(blind)} of {len(views)} nodes do not see the store {mask_text(store.uri)} "
            f"({'; '.join(blind)})",
            hint="mount the same folder on every node, or give the URI of a bucket with --store",
        )
    return [names[view.node] for view in views if not view.sees_run]


def _living_nodes() -> dict[str, str]:
    """Id -> host name of the nodes that are there now."""
    import ray

    return {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}


@contextlib.contextmanager
def _notes(wall: _Wall, folder: Path, name: str, nonce: str, nodes: list[str]) -> Iterator[None]:
    """The driver's notes are there while inside; afterwards nobody's."""
    mark = folder / f".{name}-run"
    try:
        wall.write("nonce", nonce)
        mark.touch()
        yield
    finally:
        mark.unlink(missing_ok=True)
        for note in ("nonce", *nodes):
            wall.remove(note)


def _ask_all(nodes: list[str], uri: str, folder: Path, name: str, nonce: str) -> list[View]:
    """Every node's view; one that does not answer has that as its problem."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(look)
    references = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        options = ask.options(num_cpus=0, name="see the store", scheduling_strategy=there)
        references[node] = options.remote(node, uri, folder, name, nonce)
    ray.wait(list(references.values()), num_returns=len(nodes), timeout=_ANSWER)
    return [_answer(node, reference) for node, reference in references.items()]


def _answer(node: str, reference: Any) -> View:
    import ray

    try:
        view: View = ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return View(node=node, problem=f"no answer within {_ANSWER:.0f} s", sees_run=True)
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return View(node=node, problem=f"it could not look: {reason}", sees_run=True)
    return view


def _bucket(uri: str) -> Bucket | None:
    """The bucket that a store's URI names, None for a folder."""
    if "://" not in uri or uri.startswith("file://"):
        return None
    from goldcrest.cluster.store_bucket import Bucket

    return Bucket.at(uri)

"""What a job takes along: the working tree as one zip file, and a report of what is in it.

Sent is what lies under the folder, without version control, environments, caches, build products,
stores, data, files with tokens or keys, and without what `.gitignore` and `.rayignore` name (in any
folder, as git reads them). The list is made before anything is packed, so a tree that is too large
is refused at once and with the names of what makes it large. The same tree gives the same bytes,
and Ray sends a package that the cluster has already only once.

A file that the job's command names (a config) is sent wherever it lies, from outside the tree too.

A link to something inside the tree is sent as a copy (Ray unpacks no links), but not where that is
left out under its own name: `settings -> .env` is as secret as `.env`. A link that leads outside is
left out and named: who sends a folder does not expect to send others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pathspec import GitIgnoreSpec

from goldcrest.cluster.errors import InputError

SECRETS = (
    # `token` is where the docs have one write an endpoint's; a folder of that name is code.
    "token",
    "!token/",
    "*.token",
    "!*.token/",
    "auth_token",
    "!auth_token/",
    ".env",
    ".env.*",
    ".netrc",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
)
"""Tokens, keys, passwords: a job's package lies readable on every node."""
SUBMITTED = ".submitted"
"""Folder of a package for files that its command names and the tree does not have."""
EXCLUDES = (
    *SECRETS,
    ".git/",
    ".hg/",
    ".svn/",
    ".venv/",
    "/venv/",
    "node_modules/",
    "__pycache__/",
    "*.pyc",
    ".*_cache/",
    ".ipynb_checkpoints/",
    "*.egg-info/",
    "/build/",
    "/dist/",
    ".goldcrest/",
    f"/{SUBMITTED}/",
    "/mlruns/",
    "/mlflow.db*",
    "/data/",
)
"""Patterns of `.gitignore` that always apply; `/` in front: only at the top."""
IGNORE_FILES = (".gitignore", ".rayignore")
MAX_BYTES = 100_000_000
"""Largest tree that is sent unless more is allowed; Ray itself ends at 500 MiB, packed."""
_STORE_FOLDERS = ("artifacts", "leases", "runs")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can name


@dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """A file to send: its name in the package (posix, relative) and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True, kw_only=True)
class Package:
    """The files of a working tree that a job takes along."""

    root: Path
    files: tuple[PackagedFile, ...]
    links_out: tuple[str, ...]  # links that lead out of the tree, left out
    stores: tuple[str, ...]  # folders that are artifact stores, left out

    @property
    def size(self) -> int:
        """Bytes of all files, before they are packed."""
        return sum(file.size for file in self.files)

    def largest(self, count: int = 5) -> list[tuple[str, int]]:
        """The largest (name, bytes): files of their own, and folders by what else they hold.

        A file counts by itself where it is a tenth of the whole; the rest of its top folder is one
        entry, `name/`.
        """
        threshold = self.size / 10
        entries: collections.Counter[str] = collections.Counter()
        for file in self.files:
            top, inside, _ = file.name.partition("/")
            alone = file.size >= threshold or not inside
            entries[file.name if alone else f"{top}/"] += file.size
        return sorted(entries.items(), key=lambda entry: (-entry[1], entry[0]))[:count]


def collect(root: Path, excludes: Sequence[str] = ()) -> Package:
    """What of the folder `root` a job takes along; `excludes` are further patterns of .gitignore.

    Raises InputError where `root` is no folder, or what is not left out cannot be read.
    """
    root = root.resolve()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder", hint="give the folder of your code")
    search = _Search(root, GitIgnoreSpec.from_lines([*EXCLUDES, *excludes]))
    files = sorted(search.files(root, "", (), ()), key=lambda file: file.name)
    return Package(
        root=root,
        files=tuple(files),
        links_out=tuple(sorted(search.links_out)),
        stores=tuple(sorted(search.stores)),
    )


def including(package: Package, path: Path, name: str = "") -> tuple[Package, str]:
    """The package with the file `path`, also where the rules leave that out; and its name there.

    A file of the tree keeps its place. One from outside is called `.submitted/NAME`, which the
    tree may not have.
    """
    path = path.resolve()
    if path.is_relative_to(package.root):
        called = path.relative_to(package.root).as_posix()
    else:
        called = f"{SUBMITTED}/{name or path.name}"
    if any(file.name == called for file in package.files):
        return package, called
    added = PackagedFile(name=called, path=path, size=path.stat().st_size)
    files = sorted((*package.files, added), key=lambda file: file.name)
    return replace(package, files=tuple(files)), called


class _Search:
    """A walk through a working tree that leaves out what is not to be sent."""

    def __init__(self, root: Path, always: GitIgnoreSpec) -> None:
        self._root = root
        self._always = always
        self._rules = functools.cache(self._rules_of)
        self.links_out: list[str] = []
        self.stores: list[str] = []

    def files(
        self,
        folder: Path,
        name: str,
        ignores: Sequence[tuple[str, GitIgnoreSpec]],
        above: Sequence[Path],
    ) -> Iterator[PackagedFile]:
        """The files under `folder`, which is called `name` in the package ("" or "a/b/").

        `ignores` are the ignore files met so far, each with the folder it speaks of; `above` are
        the folders that this one lies in: a link back to one of them would never end.
        """
        ignores = [*ignores, *_ignore_files(folder, name)]
        inside = [*above, _real(folder)]
        for path, is_folder in _entries(folder):
            called = f"{name}{path.name}"
            if self._is_left_out(called + "/" * is_folder, ignores):
                continue
            real = _real(path) if path.is_symlink() else inside[-1] / path.name
            if not real.is_relative_to(self._root):
                self.links_out.append(called)
                continue
            if self._is_left_out_there(real, called):
                continue
            if not is_folder:
                size = _file_size(path)
                if size is not None:
                    yield PackagedFile(name=called, path=path, size=size)
            elif is_store(path):
                self.stores.append(called)
            elif real not in inside:
                yield from self.files(path, f"{called}/", ignores, inside)

    def _is_left_out(self, called: str, ignores: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
        if self._always.match_file(called):
            return True
        said = False
        for where, spec in ignores:  # a file further down has the last word, as in git
            found = spec.check_file(called.removeprefix(where)).include
            said = said if found is None else found
        return said

    def _is_left_out_there(self, real: Path, called: str) -> bool:
        """Whether `real`, which a link shows as `called`, is left out where it lies."""
        name = real.relative_to(self._root).as_posix()
        if name == called or real == self._root:
            return False
        rules = self._rules(real.parent)
        return rules is None or self._is_left_out(name + "/" * real.is_dir(), rules)

    def _rules_of(self, folder: Path) -> tuple[tuple[str, GitIgnoreSpec], ...] | None:
        """The ignore files for what lies in a folder of the tree; None if it is left out itself."""
        if folder == self._root:
            return tuple(_ignore_files(folder, ""))
        name = f"{folder.relative_to(self._root).as_posix()}/"
        above = self._rules(folder.parent)
        if above is None or self._is_left_out(name, above) or is_store(folder):
            return None
        return (*above, *_ignore_files(folder, name))


def _real(path: Path) -> Path:
    """Where links lead; unlike `Path.resolve`, no error for one that leads to itself."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system refuses, as a sentence: of another user, or gone in the meantime."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}",
            hint="leave it out with --exclude, or make it readable",
        ) from error


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """What lies in a folder, by name, each with whether it is a folder itself."""
    with _reading(folder):
        return [(path, path.is_dir()) for path in sorted(folder.iterdir())]


def _file_size(path: Path) -> int | None:
    """Bytes of a file; None for a socket, a pipe, a broken link."""
    with _reading(path):
        return path.stat().st_size if path.is_file() else None


def _ignore_files(folder: Path, name: str) -> Iterator[tuple[str, GitIgnoreSpec]]:
    for file in IGNORE_FILES:
        path = folder / file
        with _reading(path):
            there = path.is_file()
            text = path.read_text(encoding="utf-8", errors="replace") if there else ""
        if text:
            yield name, GitIgnoreSpec.from_lines(text.splitlines())


def is_store(folder: Path) -> bool:
    """Whether `folder` is laid out as an artifact store."""
    with _reading(folder):
        return all((folder / name).is_dir() for name in _STORE_FOLDERS)


def check_size(package: Package, limit: int = MAX_BYTES) -> None:
    """Refuse a package of more than `limit` bytes: InputError that names what makes it large."""
    from goldcrest.cluster.report import file_size

    if not package.files:
        raise InputError(f"there is nothing to send in {package.root}")
    if package.size > limit:
        named = ", ".join(f"{name} ({file_size(size)})" for name, size in package.largest())
        raise InputError(
            f"the working tree has {file_size(package.size)} to send, more than "
            f"{file_size(limit)}; the largest: {named}",
            hint="leave things out with --exclude or .gitignore, keep data outside the tree, or "
            "allow more with --max-upload",
        )


def write_zip(package: Package, path: Path) -> int:
    """Pack the files into the zip file `path`, the same bytes for the same files; its size.

    Raises InputError for a file that cannot be read.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in package.files:
            facts = zipfile.ZipInfo(file.name, _EPOCH)
            facts.compress_type = zipfile.ZIP_DEFLATED
            executable = os.access(file.path, os.X_OK)
            facts.external_attr = (0o755 if executable else 0o644) << 16
            with archive.open(facts, "w") as target:
                for piece in _pieces(file.path):
                    target.write(piece)
    return path.stat().st_size


def _pieces(path: Path) -> Iterator[bytes]:
    with _reading(path), path.open("rb") as source:
        while piece := source.read(1 << 20):
            yield piece

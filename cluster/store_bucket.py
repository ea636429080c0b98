"""A bucket: the six things that a store needs of any remote file system.

Works over every `pyarrow.fs` and, through pyarrow's adapter, every fsspec file system. No renames,
no locks, no conditional writes are asked of it; only that a completed `put` is seen by the next
`get` and `names` (true of S3, GCS, Azure and HDFS).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.masking import mask_text

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_BLOCK = 4 << 20
# Their objects appear whole or not at all; elsewhere a file is written aside and moved into place.
_WHOLE = ("s3", "gcs", "abfs", "memory", "s3a", "gs", "az", "adl", "oss")


class Bucket:
    """The objects below one folder of a file system, by their names relative to it."""

    def __init__(self, filesystem: FileSystem, base: str) -> None:
        self._fs = filesystem
        self._base = base.rstrip("/")
        kind = filesystem.type_name.removeprefix("py::fsspec+")
        self._whole = kind in _WHOLE

    @classmethod
    def at(cls, uri: str) -> Bucket:
        """The bucket that `uri` names: pyarrow's own file systems first, then fsspec's."""
        from pyarrow import fs

        try:
            filesystem, base = fs.FileSystem.from_uri(uri)
        except (ValueError, NotImplementedError):  # pyarrow doesn't know the scheme
            filesystem, base = _from_fsspec(uri)
        return cls(filesystem, base)

    def put(self, name: str, content: bytes) -> None:
        """Write a small object; readers see all of it or the one before."""
        path = self._path(name)
        if self._whole:
            self._write(path, content)
        else:
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            part = f"{path}.{secrets.token_hex(6)}.part"
            self._write(part, content)
            self._fs.move(part, path)

    def _write(self, path: str, content: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)

    def get(self, name: str) -> bytes | None:
        """The content of a small object, None if there is none."""
        try:
            with self._fs.open_input_stream(self._path(name)) as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Names of the objects in `folder`, relative to it, in order; [] if there is none."""
        found = self.times(folder, recursive=recursive)
        return [name for name in found if not name.endswith(".part")]

    def times(self, folder: str, *, recursive: bool = False) -> dict[str, float]:
        """The same with the time of each, in seconds of the store's own clock (0: not known).

        Objects that `put` left half-written (".part") are listed too.
        """
        from pyarrow import fs

        place = self._path(folder)
        selector = fs.FileSelector(place, allow_not_found=True, recursive=recursive)
        start = len(place.lstrip("/")) + 1
        infos = [info for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        found = {info.path.lstrip("/")[start:]: (info.mtime_ns or 0) / 1e9 for info in infos}
        return dict(sorted(found.items()))

    def now(self) -> float:
        """The store's own clock, by the time of an object that we write (0: it has none)."""
        name = f"clock/{secrets.token_hex(8)}"
        self.put(name, b"")
        try:
            return self.times("clock").get(name.removeprefix("clock/"), 0.0)
        finally:
            self.delete(name)

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file to an object, block by block."""
        target = self._path(name)
        if not self._whole:
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, self._fs.open_output_stream(target) as stream:
            while block := source.read(_BLOCK):
                stream.write(block)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The content of an object, block by block; FileNotFoundError if there is none."""
        with self._fs.open_input_stream(self._path(name)) as stream:
            while block := stream.read(_BLOCK):
                yield bytes(block)

    def size(self, name: str) -> int:
        """Bytes of an object, 0 if there is none."""
        return int(self._fs.get_file_info(self._path(name)).size or 0)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        try:
            self._fs.delete_file(self._path(name))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base


def _from_fsspec(uri: str) -> tuple[FileSystem, str]:
    from pyarrow import fs

    try:
        import fsspec

        filesystem, base = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"'{mask_text(uri)}' can't be opened as a store: {mask_text(str(error))}",
            hint="give a local folder, or a URI that pyarrow or an installed fsspec package knows",
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), base

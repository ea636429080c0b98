"""Artifact and Output: how a step reads its inputs and writes its result.

An artifact is a folder of open formats -- Parquet for tables, safetensors for tensors, JSON for
facts, PNG for figures -- described by `manifest.json`. Checksums are verified at the first read.
Everything an `Output` writes is deterministic: the same content gives the same bytes. What differs
from run to run (seconds, throughput) goes to `Output.measure`, which only the manifest keeps.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from goldcrest.cluster.errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from matplotlib.figure import Figure

    from goldcrest.cluster.api import Runtime

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def safe_member(name: str) -> PurePosixPath:
    """`name` as a relative path that stays inside its folder, or a ValueError."""
    path = PurePosixPath(name)
    bad = not path.parts or path.is_absolute() or "\0" in name or "\\" in name
    if bad or any(part in ("..", ".") for part in name.split("/")):
        raise ValueError(f"'{name}' is not a plain relative file name")
    return path


def merge_nested(into: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings in place, later leaves win; returns `into`."""
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge_nested(into[key], value)
        else:
            into[key] = merge_nested({}, value) if isinstance(value, Mapping) else value
    return into


def _check_finite(value: Any, where: str) -> None:
    """Metrics are finite or None: a NaN is a bug to be found here, not in a table."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_finite(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _check_finite(inner, f"{where}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {where} is {value}; metrics must be finite")


class Artifact:
    """The immutable, verified result of one step. Reads check size and SHA-256 once per file."""

    def __init__(self, path: Path | str, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._verified: set[str] = set()

    @classmethod
    def at(cls, path: Path | str) -> Artifact:
        """The artifact in a folder with a manifest (a StoreError if there is none)."""
        manifest = Path(path) / MANIFEST
        if not manifest.is_file():
            raise StoreError(f"{path} is not an artifact: it has no {MANIFEST}")
        return cls(path, json.loads(manifest.read_text(encoding="utf-8")))

    def __repr__(self) -> str:
        return f"Artifact({self.step}, {self.key[:12]})"

    @property
    def key(self) -> str:
        """The content address of this artifact, 64 hex digits."""
        return str(self.manifest["key"])

    @property
    def step(self) -> str:
        """Name of the step that made it."""
        return str(self.manifest["step"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The nested facts that the step reported."""
        return dict(self.manifest.get("metrics", {}))

    def __contains__(self, name: str) -> bool:
        files = self.manifest["files"]
        return name in files or any(member.startswith(f"{name}/") for member in files)

    def file(self, name: str) -> Path:
        """Path of one member file, verified against the manifest."""
        facts = self.manifest["files"].get(str(safe_member(name)))
        if facts is None:
            known = ", ".join(sorted(self.manifest["files"]))
            raise StoreError(f"artifact {self.step} has no file '{name}'; it has: {known}")
        path = self.path / name
        if name not in self._verified:
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise StoreError(f"artifact file {path} is missing or has the wrong size")
            if sha256_file(path) != facts["sha256"]:
                raise StoreError(f"artifact file {path} is damaged: its checksum differs")
            self._verified.add(name)
        return path

    def shards(self, name: str) -> list[Path]:
        """The Parquet files of table `name`, in row order, verified."""
        members = sorted(m for m in self.manifest["files"] if m.startswith(f"{name}/"))
        if not members and f"{name}.parquet" in self.manifest["files"]:
            members = [f"{name}.parquet"]
        if not members:
            raise StoreError(f"artifact {self.step} has no table '{name}'")
        return [self.file(member) for member in members]

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Table `name` (one file or shards) as an Arrow table, only `columns` if given."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables(pq.read_table(s, columns=columns) for s in self.shards(name))

    def matrix(self, name: str, column: str) -> np.ndarray:
        """(N, D) array from a column of equally long lists in table `name`."""
        values = self.table(name, [column]).column(column).combine_chunks()
        flat = values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(values), -1)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `name`.safetensors, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.file(f"{name}.safetensors"))

    def json(self, name: str) -> Any:
        """The content of `name`.json."""
        return json.loads(self.file(f"{name}.json").read_text(encoding="utf-8"))


class ShardWriter:
    """Writes a table as Parquet shards `name/part-00000.parquet` of about `shard_bytes` each."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: list[pa.Table] = []
        self._bytes = 0
        self._count = 0
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; a shard is written whenever enough bytes are waiting."""
        if table.num_rows == 0:
            return
        self._pending.append(table)
        self._bytes += table.nbytes
        self.rows += table.num_rows
        if self._bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._pending:
            path = self._folder / f"part-{self._count:05d}.parquet"
            pq.write_table(pa.concat_tables(self._pending), path, compression="zstd")
            self._pending, self._bytes = [], 0
            self._count += 1

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()


class Output:
    """Where a step writes: a temporary folder that the store commits as one artifact.

    `seed` is the step's seed; `scratch` is a folder on the store's disk that survives a kill and
    is kept until the step is committed (checkpoints); `runtime` runs the step's own fan-out.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        runtime: Runtime,
        seed: int = 0,
        scratch: Path | str | None = None,
        on_progress: Callable[[float | None, str], None] | None = None,
        on_log: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.runtime = runtime
        self.seed = seed
        self.scratch = Path(scratch) if scratch is not None else self.path.parent / "scratch"
        self.collected_metrics: dict[str, Any] = {}
        self.measurements: dict[str, Any] = {}
        self._on_progress = on_progress
        self._on_log = on_log
        self._log: list[dict[str, float]] = []

    def part(self, name: str, seed: int) -> Output:
        """This output for a part of the step that trains on its own: own scratch, own seed."""
        part = copy.copy(self)
        part.scratch, part.seed = self.scratch / safe_member(name), seed
        return part

    def file(self, name: str) -> Path:
        """A path to write a free-form member file to; parent folders are made."""
        path = self.path / safe_member(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(self, name: str, table: pa.Table | Mapping[str, Any]) -> None:
        """Write `name`.parquet from an Arrow table or a mapping of columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        made = table if isinstance(table, pa.Table) else pa.table(dict(table))
        pq.write_table(made, self.file(f"{name}.parquet"), compression="zstd")

    def shards(self, name: str, shard_bytes: int = 64 << 20) -> ShardWriter:
        """A context manager that writes table `name` as Parquet shards, streaming."""
        return ShardWriter(self.path / safe_member(name), shard_bytes)

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `name`.safetensors."""
        from safetensors.torch import save_file

        # Copies: safetensors refuses tensors that share memory (tied or sliced ones).
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(plain, self.file(f"{name}.safetensors"))

    def json(self, name: str, value: Any) -> None:
        """Write `name`.json, sorted and indented."""
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        self.text(f"{name}.json", text + "\n")

    def text(self, name: str, text: str) -> None:
        """Write a text file (UTF-8); `name` carries the extension."""
        self.file(name).write_text(text, encoding="utf-8")

    def figure(self, name: str, figure: Figure) -> None:
        """Write a matplotlib figure as `figures/name.png` and close it; reports show it."""
        figure.savefig(
            self.file(f"figures/{name}.png"),
            dpi=110,
            bbox_inches="tight",
            metadata={"Software": None},
        )
        figure.clear()

    def metrics(self, **values: Any) -> None:
        """Report final, deterministic facts as nested mappings; later calls merge."""
        _check_finite(values, "metrics")
        merge_nested(self.collected_metrics, values)

    def measure(self, **values: Any) -> None:
        """Report what differs from run to run (seconds, items/s, MB); kept in the manifest only."""
        _check_finite(values, "measurements")
        merge_nested(self.measurements, values)

    def log(self, **values: float) -> None:
        """Append one row to the step's curves over time (`log.jsonl`), e.g. one per epoch."""
        _check_finite(values, "log")
        self._log.append(dict(values))
        rows = (json.dumps(row, sort_keys=True) for row in self._log)
        self.text("log.jsonl", "\n".join(rows) + "\n")
        if self._on_log is not None:
            self._on_log(values)

    def progress(self, done: float | None = None, note: str = "") -> None:
        """Tell the user how far this step is: a share in [0, 1] (or None) and a short note."""
        if self._on_progress is not None:
            self._on_progress(done, note)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative name: {"bytes", "sha256"}}` of every file in `folder`, fsynced on the way."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files

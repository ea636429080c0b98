"""Checkpoints of the training engine: written whole or not at all, verified before they are read.

    <scratch>/checkpoints/epoch-00003/
        checkpoint.json           position, history, totals, settings, checksum of every other file
        shard-00000.safetensors   worker 0's fragments: "weight:0:encoder.w", "exp_avg:0:encoder.w"
        shard-00001.safetensors   worker 1's, "weight:4096:encoder.w", ...
        whole.safetensors         buffers and frozen parameters by name
        extra.safetensors         the objective's extra state

Keys are kind:start:name, pieces of flattened parameters, so that any number of workers and any ZeRO
stage can read what another wrote. safetensors and JSON only: DeepSpeed's own checkpoints are
pickles, which run code when they are read, and are tied to the stage and worker count that wrote
them. The folder is filled under a hidden name, flushed, and renamed; the one before it is kept, and
a damaged checkpoint falls back to it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from goldcrest.cluster.artifact import describe_files, sha256_file
from goldcrest.cluster.errors import StoreError

FORMAT = 1
FACTS = "checkpoint.json"
KEPT = 2
WEIGHT = "weight"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Everything in a checkpoint that is not a tensor.

    `epoch` and `step` are those to continue with. `shapes` are the parameters' shapes, `aliases`
    second names of shared parameters.
    """

    epoch: int
    step: int
    seed: int
    examples: int
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    aliases: dict[str, str]
    history: list[dict[str, float]]
    totals: dict[str, float]
    workers: int
    loss_scale: dict[str, float] = field(default_factory=dict)


def folder_of(scratch: Path) -> Path:
    """The folder of all checkpoints of a training."""
    return scratch / "checkpoints"


def folder_after(scratch: Path, epoch: int) -> Path:
    """The folder of the checkpoint after `epoch` epochs."""
    return folder_of(scratch) / f"epoch-{epoch:05d}"


def hidden_folder(scratch: Path, epoch: int) -> Path:
    """The folder in which that checkpoint is written until it is complete."""
    return folder_of(scratch) / f".epoch-{epoch:05d}"


def _flush(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin(scratch: Path, epoch: int) -> Path:
    """An empty hidden folder for the checkpoint after `epoch` epochs (worker 0 calls this)."""
    temporary = hidden_folder(scratch, epoch)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def write_tensors(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `name`.safetensors, flushed to the disk."""
    path = folder / f"{name}.safetensors"
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
    _flush(path)


def commit(scratch: Path, position: Position) -> Path:
    """Describe, flush and rename the hidden folder of `position.epoch`; drop older checkpoints."""
    temporary = hidden_folder(scratch, position.epoch)
    target = folder_after(scratch, position.epoch)
    facts = {"format": FORMAT, **asdict(position), "files": describe_files(temporary)}
    path = temporary / FACTS
    path.write_text(json.dumps(facts, indent=1, allow_nan=False), encoding="utf-8")
    _flush(path)
    _flush(temporary)
    shutil.rmtree(target, ignore_errors=True)  # only ever a damaged one, which we fell back from
    temporary.rename(target)
    _flush(target.parent)
    for old in _newest_first(scratch)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _newest_first(scratch: Path) -> list[Path]:
    return sorted(folder_of(scratch).glob("epoch-*"), reverse=True)


class Checkpoint:
    """A verified checkpoint, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            files = facts.pop("files")
            if facts.pop("format") != FORMAT:
                raise StoreError(f"checkpoint {folder} was written in another format")
            self.position = Position(**facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"checkpoint {folder} cannot be read: {error}") from error
        self._files = files
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] | None = None

    def verify(self) -> None:
        """Compare size and checksum of every file; a StoreError names the first that differs."""
        for name, expected in self._files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise StoreError(f"checkpoint file {path} is missing or has the wrong size")
            if sha256_file(path) != expected["sha256"]:
                raise StoreError(f"checkpoint file {path} is damaged: its checksum differs")

    def _index(self) -> dict[tuple[str, str], list[tuple[int, Any, str]]]:
        """(kind, parameter) -> its pieces as (start, open shard, key)."""
        if self._pieces is None:
            self._pieces = {}
            for path in sorted(self.folder.glob("shard-*.safetensors")):
                shard = safe_open(path, framework="pt")  # maps the file, reads what is asked for
                for key in shard.keys():  # noqa: SIM118 - safe_open is not a mapping
                    kind, start, name = key.split(":", 2)
                    self._pieces.setdefault((kind, name), []).append((int(start), shard, key))
        return self._pieces

    def kinds(self) -> list[str]:
        """The kinds of optimizer state that the shards hold."""
        return sorted({kind for kind, _ in self._index()} - {WEIGHT})

    def scalar(self, kind: str, name: str) -> torch.Tensor | None:
        """The one value of `kind` for a parameter, shape (1,), None where it was never stepped."""
        pieces = self._index().get((kind, name))
        return pieces[0][1].get_tensor(pieces[0][2]) if pieces else None

    def piece(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor | None:
        """Values start:start+numel of a flattened parameter, put together from all shards."""
        pieces = self._index().get((kind, name))
        if not pieces:
            return None
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for begins, shard, key in pieces:
            held = shard.get_slice(key)
            low, high = max(start, begins), min(start + numel, begins + held.get_shape()[0])
            if low < high:
                out[low - start : high - start] = held[low - begins : high - begins]
                filled += high - low
        if filled != numel:
            raise StoreError(f"checkpoint {self.folder} holds only part of '{kind}' of '{name}'")
        return out

    def weight(self, name: str) -> torch.Tensor | None:
        """A whole optimized parameter in fp32, None if it was not optimized."""
        shape = self.position.shapes.get(name)
        if shape is None:
            return None
        flat = self.piece(WEIGHT, name, 0, torch.Size(shape).numel())
        return None if flat is None else flat.view(shape)

    def whole(self) -> dict[str, torch.Tensor]:
        """Buffers and frozen parameters by name."""
        return load_file(self.folder / "whole.safetensors")

    def extra(self) -> dict[str, torch.Tensor]:
        """The objective's extra state."""
        return load_file(self.folder / "extra.safetensors")

    def model_state(self) -> dict[str, torch.Tensor]:
        """The full state dict: fp32 weights, buffers, both names of shared parameters."""
        state = self.whole()
        for name in self.position.shapes:
            weight = self.weight(name)
            if weight is not None:
                state[name] = weight
        for alias, name in self.position.aliases.items():
            state[alias] = state[name]
        return state


def latest(scratch: Path, note: Callable[[str], None] = _log.warning) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none; `note` hears of damaged ones."""
    for folder in _newest_first(scratch):
        try:
            found = Checkpoint(folder)
            found.verify()
        except StoreError as error:
            note(f"{error.message}; falling back to the checkpoint before it")
            continue
        return found
    return None

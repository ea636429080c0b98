"""A run's record in the store: what was asked, what happened, what came of it.

<store>/runs/<run>/run.json       what was asked and how it stands; enough to repeat the command
                   events.jsonl   one event per line, in order
                   result.json    the stable JSON of `--json`, once the run has ended
                   logs/          what each step printed
                   progress/      what each step told while it ran
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from goldcrest.cluster.events import Event, Listener, RunResult
from goldcrest.cluster.json_text import json_text
from goldcrest.cluster.masking import mask_secrets, mask_text, mask_words
from goldcrest.cluster.plan import Plan
from goldcrest.cluster.process_id import aside


def new_run_id(pipeline: str) -> str:
    """A name for a run that sorts by time: 20261121-020300-speaker-1f3a."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{pipeline}-{secrets.token_hex(2)}"


def plain_config(config: Any) -> dict[str, Any]:
    """A pipeline's config as plain values that build it again."""
    return dict(config.model_dump(mode="json")) if hasattr(config, "model_dump") else {}


class RunRecord:
    """Writes `run.json` and `result.json`; a disk that refuses costs the record, not the run."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._facts = {
            **facts,
            "command": mask_words(sys.argv),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }

    @classmethod
    def begin(
        cls,
        folder: Path,
        *,
        run_id: str,
        plan: Plan,
        module: str,
        config: Mapping[str, Any],
        store_uri: str,
        profile: Mapping[str, Any],
    ) -> RunRecord:
        """The record of a run that has just been planned."""
        record = cls(
            folder,
            {
                "run": run_id,
                "pipeline": plan.pipeline,
                "module": module,
                "config": mask_secrets(config),
                "store": mask_text(store_uri),
                "profile": mask_secrets(profile),
                "plan": plan.as_json(),
            },
        )
        record.write("running")
        return record

    def write(self, status: str, **more: Any) -> None:
        """Replace `run.json` as a whole."""
        self._replace("run.json", {**self._facts, "status": status, **more})

    def finish(self, result: RunResult) -> None:
        """Write the result and close the record."""
        self._replace("result.json", result.as_json())
        self.write(result.status, seconds=round(result.seconds, 3), ended=time.time())

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        path = self.folder / name
        unfinished = aside(path)
        with contextlib.suppress(OSError):
            text = json_text(value, indent=2, sort_keys=True, default=str)
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(path)


class EventFile:
    """A listener that appends every event to `events.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_event(self, event: Event) -> None:
        """Append one line."""
        line = json_text(mask_secrets(event.as_json()), default=str)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


class Notifier:
    """Hands events to the listeners; one that raises is told of once and asked no more."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        """Tell everybody who still listens."""
        for listener in list(self._listeners):
            try:
                listener.on_event(event)
            except Exception as error:  # noqa: BLE001 - tracking and reports never fail a run
                self._listeners.remove(listener)
                name = type(listener).__name__
                text = (
                    f"goldcrest: {name} stopped ({type(error).__name__}: {error}); the run goes on"
                )
                print(text, file=sys.stderr)  # noqa: T201 - there may be no other listener


class ProgressReader:
    """Reads the new whole lines of the workers' `progress/<step>.jsonl` files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "progress"
        self._offsets: dict[str, int] = {}

    def skip_old(self, steps: Sequence[str]) -> None:
        """What lies there now belongs to an earlier attempt under the same name of the run."""
        for step in steps:
            with contextlib.suppress(OSError):
                self._offsets[step] = (self._folder / f"{step}.jsonl").stat().st_size

    def new(self, step: str) -> list[dict[str, Any]]:
        """The lines of `step` since the last call."""
        offset = self._offsets.get(step, 0)
        try:
            with (self._folder / f"{step}.jsonl").open("rb") as stream:
                stream.seek(offset)
                content = stream.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offsets[step] = offset + len(whole)
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # two attempts wrote at once: one line is lost
                lines.append(json.loads(line))
        return lines


def last_lines(path: Path, count: int = 20, *, limit: int = 64 << 10) -> tuple[str, ...]:
    """The last lines of a text file, () if there is none; at most `limit` bytes are read."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - limit))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-count:]

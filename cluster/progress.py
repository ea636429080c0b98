"""Live progress of a run: a table that redraws itself on a terminal, plain lines anywhere else.

Both are listeners of a run (`goldcrest.cluster.events`). Without a terminal there is not one ANSI
sequence in the output, and a long step speaks at most every `PLAIN_INTERVAL` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from goldcrest.cluster.events import (
    Event,
    RunFinished,
    RunStarted,
    StepChanged,
    StepLog,
    StepProgress,
)
from goldcrest.cluster.masking import mask_text

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines about the same running step."""
KEY_METRICS = 3
"""Most metrics shown beside a step."""
_QUIET = {"epoch", "learning_rate", "skipped_steps"}  # in the history, but not worth a line

_SIGN = {
    "waiting": ("·", "dim"),
    "cached": ("=", "cyan"),
    "ran": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("-", "yellow"),
}


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: object) -> str:
    """A metric for people: whole numbers whole, others with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def key_metrics(values: Mapping[str, Any], most: int = KEY_METRICS) -> str:
    """The first few numbers of nested metrics as `name=value`, in their own order."""
    pairs = [(name, value) for name, value in _numbers(values) if name not in _QUIET]
    return "  ".join(f"{name}={number(value)}" for name, value in pairs[:most])


def _numbers(values: Mapping[str, Any], model: str = "") -> Iterator[tuple[str, float]]:
    """`(name, number)` of every leaf; inside a group (`dense`) the group's name comes first."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, str(name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (f"{model} {name}" if model else str(name)), value


@dataclass
class _Row:
    """What is known of one step now."""

    state: str = "waiting"
    reason: str = ""
    place: str = ""
    started: float | None = None
    seconds: float | None = None
    share: float | None = None
    note: str = ""
    metrics: str = ""
    failure: str = ""
    spoken: float = 0.0

    def elapsed(self, now: float) -> str:
        """How long the step has run, or ran."""
        if self.seconds is not None:
            return duration(self.seconds)
        if self.state == "running" and self.started is not None:
            return duration(max(0.0, now - self.started))
        return ""


class Progress:
    """The common part: keeps one row per step up to date. A context manager and a listener."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.rows: dict[str, _Row] = {}
        self.title = ""
        self.clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def on_event(self, event: Event) -> None:
        """Take in one event and show what changed."""
        if isinstance(event, RunStarted):
            self.title = f"{event.pipeline}  run {event.run_id}"
        elif isinstance(event, StepChanged):
            self._changed(event)
        elif isinstance(event, StepProgress):
            row = self._row(event.step)
            row.share, row.note = event.share, mask_text(event.note)
        elif isinstance(event, StepLog):
            self._row(event.step).metrics = key_metrics(event.row)
        self.show(event)

    def show(self, event: Event) -> None:
        """Bring what `event` changed before the user's eyes."""
        raise NotImplementedError

    def _row(self, step: str) -> _Row:
        return self.rows.setdefault(step, _Row())

    def _changed(self, event: StepChanged) -> None:
        row = self._row(event.step)
        if event.state == "running" and row.state != "running":
            row.started = event.time
        row.state = event.state
        row.reason = event.reason or row.reason
        row.place = event.place or row.place
        row.seconds = event.seconds
        if event.metrics:
            row.metrics = key_metrics(event.metrics)
        if event.state != "running":
            row.share, row.note = None, ""
        if event.failure is not None:
            row.failure = mask_text(event.failure.message)


class LiveProgress(Progress):
    """A table on the terminal that redraws itself four times a second."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._spinner = Spinner("dots", style="bold blue")
        self._live = Live(
            get_renderable=self.table, console=console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Redraw at once where a step's state changed; the rest waits for the next frame."""
        if isinstance(event, StepChanged | RunFinished):
            self._live.refresh()

    def table(self) -> Table:
        """The table as of now."""
        table = Table(
            title=escape(self.title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        columns: list[tuple[str, dict[str, Any]]] = [
            ("", {"width": 2}),
            ("step", {"no_wrap": True}),
            ("elapsed", {"justify": "right", "no_wrap": True}),
            ("place", {"no_wrap": True, "style": "dim"}),
            ("progress", {"overflow": "fold", "ratio": 1}),
        ]
        for name, options in columns:
            table.add_column(name, **options)
        now = self.clock()
        for step, row in list(self.rows.items()):
            sign: Spinner | Text = self._spinner
            if row.state != "running":
                symbol, style = _SIGN[row.state]
                sign = Text(symbol, style=style)
            table.add_row(sign, Text(step), row.elapsed(now), Text(row.place), _told(row))
        return table


def _told(row: _Row) -> Text:
    if row.failure:
        return Text(row.failure, style="red")
    text = Text()
    if row.state == "running" and row.share is not None:
        filled = round(12 * min(max(row.share, 0.0), 1.0))
        text.append("━" * filled, "blue").append("─" * (12 - filled), "dim")
        text.append(f" {100 * row.share:3.0f} %  ")
    if row.state == "cached":
        text.append("cached  ", "cyan")
    if row.note:
        text.append(f"{row.note}  ")
    text.append(row.metrics, "dim" if row.state == "running" else "")
    if not text and row.state in ("running", "skipped"):
        text.append(row.reason, "dim")
    return text


class PlainProgress(Progress):
    """One line of plain text per change, for files and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._stream = stream

    def show(self, event: Event) -> None:
        """Write the line that tells of `event`, if it is worth one."""
        if isinstance(event, RunStarted):
            self._say(self.title)
        elif isinstance(event, StepChanged) and event.state != "waiting":
            self._say(f"{event.step}: {self._state(self.rows[event.step])}")
            self.rows[event.step].spoken = event.time
        elif isinstance(event, StepProgress | StepLog):
            row = self.rows[event.step]
            if event.time - row.spoken >= PLAIN_INTERVAL:
                share = f"{100 * row.share:.0f} %" if row.share is not None else ""
                words = [share, row.note, row.metrics]
                self._say(f"{event.step}: {'  '.join(word for word in words if word)}")
                row.spoken = event.time

    def _state(self, row: _Row) -> str:
        if row.state == "running":
            where = f" on {row.place}" if row.place else ""
            return f"running{where}" + (f" ({row.reason})" if row.reason else "")
        if row.state == "ran":
            return f"done in {row.elapsed(self.clock())}" + (
                f"  {row.metrics}" if row.metrics else ""
            )
        if row.state == "failed":
            return f"FAILED: {row.failure or row.reason}"
        return row.state + (f" ({row.reason})" if row.reason else "")

    def _say(self, line: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in mask_text(line))
        self._stream.write(printable + "\n")
        self._stream.flush()


def make_progress(console: Console) -> Progress:
    """The progress that suits `console`: live on a terminal, plain lines otherwise."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console.file)  # type: ignore[arg-type]

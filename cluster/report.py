"""The report of a run: one HTML file that needs nothing beside itself.

It is made from the run's events (`goldcrest.cluster.events`, as the JSON of `events.jsonl`) and
the figures of its artifacts, so it can be written again at any time. Everything that comes from
data is escaped (Jinja's autoescape; drawings are `Markup`), the page has no script and loads
nothing (its content security policy says so), and secrets are masked.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goldcrest.cluster.artifact import safe_member
from goldcrest.cluster.config_file import flatten
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.events import Event, RunFinished, RunStarted, StepProgress
from goldcrest.cluster.masking import mask_secrets, mask_text
from goldcrest.cluster.process_id import aside
from goldcrest.cluster.progress import duration, number
from goldcrest.cluster.report_drawings import Span, draw_curve, draw_dag, draw_timeline

REPORT = "report.html"
MAX_FIGURE = 4 << 20
"""Largest figure that is embedded, in bytes."""
MAX_FIGURES = 24 << 20
"""Most bytes of figures in one report."""
MAX_CURVES = 16
"""Most curves shown for one step."""
_PNG = b"\x89PNG\r\n\x1a\n"


class ReportWriter:
    """A listener that keeps a run's events and writes its report at the end."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._folder: Path | None = None

    def on_event(self, event: Event) -> None:
        """Keep the event; at the end write the report and note its path in the result."""
        if isinstance(event, StepProgress):
            return
        if isinstance(event, RunStarted):
            self._folder = event.folder
        self._events.append(event.as_json())
        if isinstance(event, RunFinished) and self._folder is not None:
            path = self._folder / REPORT
            write_text(path, render(self._events))
            event.result.report = str(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there in full or not at all."""
    temporary = aside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in `events.jsonl`; a last line that a kill cut short is left out."""
    events: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"the record of this run cannot be read: {error}") from None
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


# ----------------------------------------------------------------------- from events to the page


@dataclass(kw_only=True)
class StepFacts:
    """What the events said about one step."""

    name: str
    task: str = ""
    state: str = "waiting"
    reason: str = ""
    notice: str = ""
    place: str = ""
    key: str = ""
    path: str = ""
    begin: float | None = None
    end: float | None = None
    seconds: float | None = None
    inputs: dict[str, str | None] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def took(self) -> str:
        """The step's own time, for people."""
        return duration(self.seconds) if self.seconds is not None else ""

    @property
    def config(self) -> dict[str, Any]:
        """The step's config by dotted name, secrets masked."""
        return flatten(mask_secrets(self.manifest.get("config") or {}))

    @property
    def metrics(self) -> dict[str, Any]:
        """Final metrics by dotted name."""
        return flatten(dict(self.manifest.get("metrics") or {}))

    @property
    def measurements(self) -> dict[str, Any]:
        """What differs from run to run, by dotted name."""
        return flatten(dict(self.manifest.get("measurements") or {}))

    @property
    def files(self) -> dict[str, Any]:
        """The artifact's members as the manifest lists them."""
        return dict(self.manifest.get("files") or {})

    @property
    def facts(self) -> dict[str, str]:
        """Small facts for the step's table."""
        host = self.manifest.get("host")
        facts = {
            "task": f"{self.task} (version {self.manifest.get('version', '?')})"
            if self.task
            else "",
            "why": self.reason,
            "notice": self.notice,
            "place": self.place,
            "time": self.took,
            "key": self.key,
            "folder": self.path,
            "made": f"{self.manifest.get('created', '')}",
            "made on": host if isinstance(host, str) else json.dumps(host) if host else "",
            "made in run": f"{self.manifest.get('run') or ''}",
            "source": f"{self.manifest.get('source') or ''}",
            "seed": f"{self.manifest['seed']}" if self.manifest.get("seed") is not None else "",
        }
        return {name: mask_text(text) for name, text in facts.items() if text}


@dataclass(kw_only=True)
class RunFacts:
    """What the events said about the whole run."""

    run: str = ""
    pipeline: str = ""
    folder: str = ""
    begin: float = 0.0
    end: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepFacts] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """How the run ended, or that it did not."""
        return str(self.result.get("status", "unfinished"))


def collect(events: Iterable[Mapping[str, Any]]) -> RunFacts:
    """Put the events of one run together."""
    run = RunFacts()
    for event in events:
        stamp = float(event.get("time") or 0.0)
        run.end = max(run.end, stamp)
        kind = event["event"]
        if kind == "RunStarted":
            run = _begin(event, stamp)
        elif kind == "StepChanged":
            _change(_step(run, event["step"]), event, stamp)
        elif kind == "StepLog":
            _step(run, event["step"]).log.append(dict(event["row"]))
        elif kind == "RunFinished":
            run.result = dict(event["result"])
    return run


def _begin(event: Mapping[str, Any], stamp: float) -> RunFacts:
    plan = event.get("plan") or {}
    steps = {
        planned["name"]: StepFacts(
            name=planned["name"],
            task=planned.get("task", ""),
            key=planned.get("key", ""),
            reason=planned.get("reason", ""),
            notice=planned.get("notice", ""),
            inputs=dict(planned.get("inputs") or {}),
        )
        for planned in plan.get("steps", [])
    }
    return RunFacts(
        run=event["run_id"],
        pipeline=event["pipeline"],
        folder=str(event["folder"]),
        begin=stamp,
        end=stamp,
        config=mask_secrets(event["config"]),
        steps=steps,
    )


def _step(run: RunFacts, name: str) -> StepFacts:
    return run.steps.setdefault(name, StepFacts(name=name))


def _change(step: StepFacts, event: Mapping[str, Any], stamp: float) -> None:
    state = event["state"]
    if state == "running" and step.state != "running":
        step.begin = stamp
    if state in ("ran", "cached", "failed"):
        step.end = stamp
    step.state = state
    step.seconds = event.get("seconds")
    step.failure = event.get("failure")
    if event.get("manifest"):
        step.manifest = dict(event["manifest"])
    for name in ("reason", "place", "key", "path"):
        if event.get(name):
            setattr(step, name, str(event[name]))


def render(events: Iterable[Mapping[str, Any]]) -> str:
    """The report as HTML text."""
    run = collect(events)
    steps = list(run.steps.values())
    edges = {step.name: [i for i in step.inputs.values() if i in run.steps] for step in steps}
    total = float(run.result.get("seconds") or run.end - run.begin)
    figures = _Figures()
    return fill_page(
        "report_template.html",
        run=run,
        steps=steps,
        counts=_counts(steps),
        total=total,
        began=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.begin)),
        tables=metric_tables(run.result.get("metrics") or {}),
        bundles=_bundles(run),
        dag=draw_dag(edges, {step.name: (step.state, _second_line(step)) for step in steps}),
        timeline=draw_timeline(_spans(run), total),
        curves={step.name: _curves(step) for step in steps},
        figures={step.name: figures.of(step) for step in steps},
        left_out=figures.left_out,
        config=flatten(run.config),
        packages=_packages(steps),
    )


def fill_page(template: str, **values: Any) -> str:
    """One of our pages filled in: everything is escaped, nothing may be left undefined."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": show, "size": file_size, "duration": duration}
    return environment.get_template(template).render(**values)


def _counts(steps: Sequence[StepFacts]) -> dict[str, int]:
    states = [step.state for step in steps]
    order = ("ran", "cached", "failed", "skipped", "running", "waiting")
    return {state: states.count(state) for state in order if state in states}


def _second_line(step: StepFacts) -> str:
    if step.state == "ran":
        return f"ran · {step.took}"
    return f"{step.state}" + (
        f" · made in {step.took}" if step.state == "cached" and step.took else ""
    )


def _spans(run: RunFacts) -> list[Span]:
    spans = []
    for step in run.steps.values():
        if step.end is None and step.begin is None:
            continue
        end = step.end if step.end is not None else run.end
        begin = step.begin if step.begin is not None else end
        text = step.took if step.state == "ran" else step.state
        first, last = begin - run.begin, end - run.begin
        spans.append(Span(step=step.name, state=step.state, begin=first, end=last, text=text))
    return spans


def _curves(step: StepFacts) -> list[Any]:
    """One small chart per logged name, over the epoch where the rows have one."""
    names = dict.fromkeys(name for row in step.log for name in row if name != "epoch")
    charts = []
    for name in list(names)[:MAX_CURVES]:
        rows = [(index, row) for index, row in enumerate(step.log) if name in row]
        points = [(float(row.get("epoch", index)), float(row[name])) for index, row in rows]
        if len(points) > 1:
            charts.append(draw_curve(name, points))
    return charts


class _Figures:
    """Reads figures for embedding, within the limits on their sizes."""

    def __init__(self) -> None:
        self._room = MAX_FIGURES
        self.left_out: list[str] = []

    def of(self, step: StepFacts) -> list[tuple[str, str]]:
        """`(name, data URI)` of each PNG figure of the step's artifact."""
        found = []
        for name in sorted(step.files):
            if not (name.startswith("figures/") and name.endswith(".png") and step.path):
                continue
            try:
                content = (Path(step.path) / safe_member(name)).read_bytes()
            except (OSError, ValueError):
                content = b""
            fits = len(content) <= min(MAX_FIGURE, self._room)
            if not content.startswith(_PNG) or not fits:
                self.left_out.append(f"{step.name}: {name}")
                continue
            self._room -= len(content)
            title = name.removeprefix("figures/").removesuffix(".png")
            found.append((title, "data:image/png;base64," + base64.b64encode(content).decode()))
        return found


def _bundles(run: RunFacts) -> list[dict[str, Any]]:
    rows = []
    for name, path in (run.result.get("bundles") or {}).items():
        owner = next((step for step in run.steps.values() if step.path == path), None)
        size = sum(int(facts["bytes"]) for facts in owner.files.values()) if owner else None
        rows.append({"name": name, "path": path, "size": size, "step": owner.name if owner else ""})
    return rows


def _packages(steps: Sequence[StepFacts]) -> dict[str, str]:
    found: dict[str, str] = {}
    for step in steps:
        packages = step.manifest.get("packages") or {}
        found |= {str(name): str(version) for name, version in packages.items()}
    return dict(sorted(found.items()))


# -------------------------------------------------------------------------- tables of metrics


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """Metrics of one group: a row per model (or method), a column per metric."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Any, ...]], ...]


def metric_tables(metrics: Mapping[str, Any]) -> list[MetricTable]:
    """Tables from nested metrics `{group: {model: {metric: value}}}`; loose numbers come last.

    A metric that is itself a mapping (an error rate by corpus) becomes a table of its own.
    """
    tables: list[MetricTable] = []
    loose: dict[str, Any] = {}
    for group, models in metrics.items():
        if not isinstance(models, Mapping):
            loose[group] = models
            continue
        rows = {str(m): v for m, v in models.items() if isinstance(v, Mapping)}
        plain = {str(m): v for m, v in models.items() if not isinstance(v, Mapping)}
        flat = {
            model: {name: v for name, v in values.items() if not isinstance(v, Mapping)}
            for model, values in rows.items()
        }
        if any(flat.values()):
            tables.append(_table(str(group), flat))
        nested = dict.fromkeys(n for v in rows.values() for n in v if isinstance(v[n], Mapping))
        for name in nested:
            parts = {m: flatten(dict(v[name])) for m, v in rows.items() if v.get(name)}
            tables.append(_table(f"{group}, {name}", parts))
        if plain:
            tables.append(_table(str(group), {"": plain}))
    if loose:
        tables.append(_table("other", {"": loose}))
    return tables


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> MetricTable:
    columns = tuple(dict.fromkeys(column for row in rows.values() for column in row))
    values = tuple((row, tuple(cells.get(c) for c in columns)) for row, cells in rows.items())
    return MetricTable(name=name, columns=columns, rows=values)


def show(value: Any) -> str:
    """A cell for people: four significant digits, lists as intervals, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True, default=str)
    return number(value)


def file_size(size: int | float | None) -> str:
    """Bytes for people, in powers of 1,000."""
    if size is None:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"

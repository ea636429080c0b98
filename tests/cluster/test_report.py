"""The HTML report and its drawings."""

from __future__ import annotations

import base64
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.events import RunFinished, RunResult, RunStarted, StepChanged, StepLog
from goldcrest.cluster.plan import Plan
from goldcrest.cluster.report import (
    ReportWriter,
    collect,
    file_size,
    metric_tables,
    read_events,
    render,
    show,
    write_text,
)
from goldcrest.cluster.report_drawings import (
    Span,
    draw_curve,
    draw_dag,
    draw_timeline,
    layers,
    ticks,
)

PNG = b"\x89PNG\r\n\x1a\n" + b"picture"


def record(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The events of a small run: sow -> grow -> weigh, one figure, three epochs."""
    artifact = folder / "artifact"
    (artifact / "figures").mkdir(parents=True, exist_ok=True)
    (artifact / "figures" / "det.png").write_bytes(PNG)
    (artifact / "figures" / "fake.png").write_bytes(b"<script>")
    manifest = {
        "version": 2,
        "config": {"rate": 0.1, "hub_token": "hush"},
        "metrics": {"models": {"dense": {"bytes": 10}}},
        "measurements": {"rtf": 0.5},
        "inputs": {"seeds": "a" * 64},
        "files": {
            name: {"bytes": 15, "sha256": "0" * 64}
            for name in ("bundle.json", "figures/det.png", "figures/fake.png", "../../etc/passwd")
        },
        "packages": {"torch": "2.13.0"},
        "host": "node7",
        "seed": 3,
    }
    names = ["sow", "grow", "weigh"]
    steps = [
        {
            "name": name,
            "task": f"toys.{name}",
            "key": name * 3,
            "state": "run",
            "reason": "never ran",
        }
        | {"inputs": {"seeds": names[index - 1]} if index else {}}
        for index, name in enumerate(names)
    ]
    result = {
        "status": "succeeded",
        "seconds": 5.0,
        "metrics": {"verification": {"dense": {"eer": 0.1, "min_dcf_0.01": 0.5}}, "loose": 3},
        "bundles": {"dense": str(artifact)},
        "quarantined": 2,
        "error": None,
    }

    def changed(at: float, step: str, state: str, **more: Any) -> dict[str, Any]:
        return {"event": "StepChanged", "time": at, "step": step, "state": state, **more}

    return [
        {
            "event": "RunStarted",
            "time": 100.0,
            "run_id": "r1",
            "pipeline": "garden",
            "plan": {"steps": steps},
            "config": {"grow": {"rate": 0.1, "hub_token": "hush"}},
            "folder": str(folder),
        },
        changed(100.0, "sow", "cached", seconds=9.0, reason="made before"),
        changed(101.0, "grow", "running", place="node7"),
        *(
            {"event": "StepLog", "time": 101.0, "step": "grow", "index": i}
            | {"row": {"epoch": i, "loss": 1 / (1 + i)}}
            for i in range(3)
        ),
        changed(104.0, "grow", "ran", seconds=3.0, manifest=manifest, path=str(artifact)),
        changed(104.0, "weigh", "running"),
        changed(105.0, "weigh", "ran", seconds=1.0),
        {"event": "RunFinished", "time": 105.0, "result": result | changes},
    ]


class Page(HTMLParser):
    """Collects tags, attributes and text; HTMLParser undoes the escaping of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    html = render(record(tmp_path))
    page = Page(html)
    for wanted in ("garden", "r1", "succeeded", "min_dcf_0.01", "inputs quarantined", "torch"):
        assert wanted in page.text
    for step in ("sow", "grow", "weigh"):
        assert step in page.text
    assert "script" not in page.tags
    assert "link" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )
    assert "grow: figures/fake.png" in page.text  # named among what was left out
    assert page.tags.count("svg") == 3  # DAG, timeline, one curve


def test_secrets_stay_out_of_the_report(tmp_path: Path) -> None:
    assert "hush" not in render(record(tmp_path))


def test_an_unfinished_run_has_a_report_too(tmp_path: Path) -> None:
    html = render(record(tmp_path)[:4])
    assert "unfinished" in Page(html).text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    events = record(
        tmp_path, status="failed", error={"step": "grow", "message": "no water", "hint": "add some"}
    )
    failure = {"step": "grow", "message": "no water", "hint": None, "log": ["line <1>", "line 2"]}
    events.insert(6, {**events[2], "state": "failed", "failure": failure})
    text = Page(render(events[:7] + events[-1:])).text
    assert "Step grow failed" in text
    assert "add some" in text
    assert "line <1>" in text


def test_a_run_that_was_resumed_shows_its_last_attempt(tmp_path: Path) -> None:
    first = record(tmp_path)[:3]
    second = [event | {"time": event["time"] + 50} for event in record(tmp_path)]
    run = collect(first + second)
    assert run.begin == 150.0
    assert run.status == "succeeded"


def test_facts_of_a_step(tmp_path: Path) -> None:
    grow = collect(record(tmp_path)).steps["grow"]
    assert (grow.begin, grow.end, grow.seconds) == (101.0, 104.0, 3.0)
    assert grow.config == {"rate": 0.1, "hub_token": "***"}
    assert grow.facts["task"] == "toys.grow (version 2)"
    assert [row["loss"] for row in grow.log] == [1.0, 0.5, 1 / 3]


def test_the_writer_listens_and_tells_where_the_report_is(tmp_path: Path) -> None:
    writer = ReportWriter()
    plan = Plan(pipeline="garden", steps=())
    writer.on_event(
        RunStarted(run_id="r", pipeline="garden", plan=plan, config={"a": 1}, folder=tmp_path)
    )
    writer.on_event(StepChanged(run_id="r", step="sow", state="running"))
    writer.on_event(StepLog(run_id="r", step="sow", index=0, row={"loss": 1.0}))
    result = RunResult(run="r", pipeline="garden", status="succeeded", seconds=1.0, steps=[])
    writer.on_event(RunFinished(run_id="r", result=result))
    assert result.report == str(tmp_path / "report.html")
    assert "garden" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_events_cut_short_by_a_kill_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps(event) for event in record(tmp_path)]
    path.write_text("\n".join(lines)[:-30])
    assert len(read_events(path)) == len(lines) - 1
    with pytest.raises(InputError, match="cannot be read"):
        read_events(tmp_path / "absent.jsonl")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.html", "one")
    write_text(tmp_path / "a.html", "two")
    assert (tmp_path / "a.html").read_text() == "two"
    with pytest.raises(OSError, match="absent"):
        write_text(tmp_path / "absent" / "a.html", "x")


def test_metric_tables() -> None:
    tables = metric_tables(
        {
            "verification": {
                "dense": {"eer": 0.1, "by_corpus": {"a": 0.2, "b": 0.0}},
                "int8": {"eer": 0.2, "eer_ci": [0.1, 0.3]},
            },
            "clustering": {"nmi": 0.8, "cimc": {"acc": 0.9}},
            "loose": 1,
        }
    )
    assert [(t.name, t.columns) for t in tables] == [
        ("verification", ("eer", "eer_ci")),
        ("verification, by_corpus", ("a", "b")),
        ("clustering", ("acc",)),
        ("clustering", ("nmi",)),
        ("other", ("loose",)),
    ]
    assert tables[0].rows == (("dense", (0.1, None)), ("int8", (0.2, [0.1, 0.3])))
    assert tables[1].rows == (("dense", (0.2, 0.0)),)


def test_cells_and_sizes() -> None:
    cells = (None, [0.1, 0.25], {"b": 1}, "x", 3, 0.12345)
    assert [show(v) for v in cells] == ["", "[0.1, 0.25]", '{"b": 1}', "x", "3", "0.1235"]
    assert [file_size(n) for n in (None, 12, 1500, 2_340_000, 5e9)] == [
        "",
        "12 B",
        "1.5 kB",
        "2.34 MB",
        "5 GB",
    ]


# ---------------------------------------------------------------------------------- drawings


def test_layers_are_longest_paths() -> None:
    edges = {"d": ["b", "a"], "b": ["a"], "c": ["a"], "a": []}
    assert layers(edges) == {"a": 0, "b": 1, "c": 1, "d": 2}
    with pytest.raises(ValueError, match="depends on itself"):
        layers({"a": ["b"], "b": ["a"]})


@st.composite
def dags(draw: st.DrawFn) -> dict[str, list[str]]:
    count = draw(st.integers(1, 9))
    return {
        f"s{i}": draw(
            st.lists(st.sampled_from([f"s{j}" for j in range(i)]), max_size=3, unique=True)
        )
        if i
        else []
        for i in range(count)
    }


@settings(max_examples=60, deadline=None)
@given(dags())
def test_any_dag_is_drawn_without_overlaps(edges: dict[str, list[str]]) -> None:
    """Boxes do not overlap, all lie inside the view, and no edge runs through a foreign box."""
    root = ElementTree.fromstring(str(draw_dag(edges, dict.fromkeys(edges, ("ran", "1 s")))))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    boxes = []
    for rect in root.iter("rect"):
        x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
        boxes.append((x, y, x + float(rect.attrib["width"]), y + float(rect.attrib["height"])))
    assert len(boxes) == len(edges)
    assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in boxes)
    for one, two in itertools.combinations(boxes, 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart
    straight = [path.attrib["d"].split("L")[1:] for path in root.iter("path")]
    for piece in itertools.chain.from_iterable(straight):
        x, y = map(float, piece.split("C")[0].split())
        assert not any(x0 < x < x1 and y0 < y - 1 < y1 for x0, y0, x1, y1 in boxes)
    assert len(list(root.iter("path"))) == sum(len(set(above)) for above in edges.values())


def test_the_timeline_places_bars_by_time() -> None:
    spans = [
        Span(step="a", state="ran", begin=0.0, end=5.0, text="5 s"),
        Span(step="b", state="ran", begin=5.0, end=10.0, text="5 s"),
    ]
    root = ElementTree.fromstring(str(draw_timeline(spans, 10.0)))
    bars = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in root.iter("rect")]
    assert bars[0][1] == pytest.approx(bars[1][1])
    assert bars[1][0] == pytest.approx(bars[0][0] + bars[0][1])
    assert draw_timeline([], 1.0) == ""


@pytest.mark.parametrize(
    ("total", "wanted"),
    [
        (10.0, [0, 2, 4, 6, 8, 10]),
        (0.9, [0, 0.2, 0.4, 0.6, 0.8]),
        (600, [0, 120, 240, 360, 480, 600]),
    ],
)
def test_ticks_are_round(total: float, wanted: list[float]) -> None:
    assert ticks(total) == pytest.approx(wanted)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e7))
def test_ticks_are_few_and_inside(total: float) -> None:
    found = ticks(total)
    assert found[0] == 0.0
    assert found[-1] <= total * (1 + 1e-9)
    assert len(found) <= 8 or total > 6 * 86400  # more than six days: one line a day


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats()), max_size=8))
def test_any_curve_is_valid_svg(points: list[tuple[float, float]]) -> None:
    drawn = str(draw_curve("<loss & more>", points))
    if drawn:
        assert "nan" not in drawn.split("points=")[1].split("/>")[0]
        ElementTree.fromstring(drawn)

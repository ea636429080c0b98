"""What a run shows while it goes: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from goldcrest.cluster.events import (
    Event,
    Failure,
    RunFinished,
    RunResult,
    RunStarted,
    StepChanged,
    StepLog,
    StepProgress,
)
from goldcrest.cluster.plan import Plan
from goldcrest.cluster.progress import (
    LiveProgress,
    PlainProgress,
    duration,
    key_metrics,
    make_progress,
    number,
)


def events(**facts: Any) -> list[Event]:
    """One run in which `a` is cached, `b` runs, `c` fails."""

    def changed(at: float, step: str, state: Any, **more: Any) -> StepChanged:
        return StepChanged(run_id="r1", time=at, step=step, state=state, **more)

    failure = Failure(step="c", message="no water at s3://k:secret@b", hint="add some")
    plan = Plan(pipeline="garden", steps=())
    result = RunResult(run="r1", pipeline="garden", status="failed", seconds=60.0, steps=[])
    return [
        RunStarted(
            run_id="r1", time=0.0, pipeline="garden", plan=plan, config={}, folder=Path("/nowhere")
        ),
        changed(0.1, "a", "cached", reason="made before", seconds=3.0),
        changed(0.1, "b", "waiting"),
        changed(1.0, "b", "running", reason="never ran", place="node7 gpu 0"),
        StepProgress(run_id="r1", time=2.0, step="b", share=0.25, note="day [1]"),
        StepLog(run_id="r1", time=2.5, step="b", index=0, row={"epoch": 0, "loss": 0.125}),
        StepProgress(run_id="r1", time=30.0, step="b", share=0.5, note="day 2"),
        StepProgress(run_id="r1", time=31.0, step="b", share=0.6, note="day 3"),
        changed(43.0, "b", "ran", seconds=42.0, metrics={"dense": {"eer": 0.05}, "n": 7}),
        changed(44.0, "c", "failed", failure=failure, seconds=1.0),
        changed(44.0, "d", "skipped", reason="upstream `c` failed"),
        RunFinished(run_id="r1", time=60.0, result=result),
    ]


def test_plain_lines_have_no_ansi_and_speak_seldom() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, clock=lambda: 50.0) as progress:
        for event in events():
            progress.on_event(event)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.splitlines() == [
        "garden  run r1",
        "a: cached (made before)",
        "b: running on node7 gpu 0 (never ran)",
        "b: 50 %  day 2  loss=0.125",
        "b: done in 42 s  dense eer=0.05  n=7",
        "c: FAILED: no water at s3://***@b",
        "d: skipped (upstream `c` failed)",
    ]


def test_plain_lines_cannot_be_broken_by_what_a_step_says() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.on_event(
        StepChanged(run_id="r", step="a", state="skipped", reason="x\n\x1b[31mred\rdone")
    )
    assert stream.getvalue() == "a: skipped (x  [31mred done)\n"


def render(progress: LiveProgress) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(progress.table())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_live_table_shows_state_place_time_share_and_metrics() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = LiveProgress(screen, clock=lambda: 11.0)
    for event in events()[:6]:
        progress.on_event(event)
    shown = render(progress)
    row = next(line for line in shown.splitlines() if "node7" in line)
    assert "10 s" in row  # from 1.0, when it began, to the clock's 11.0
    assert "25 %" in row
    assert "day [1]" in row  # literal text, not markup
    assert "loss=0.125" in row
    for event in events()[6:]:
        progress.on_event(event)
    shown = render(progress)
    assert "dense eer=0.05" in shown
    assert "no water at s3://***@b" in shown


def test_a_live_table_starts_and_stops() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(KeyboardInterrupt), LiveProgress(screen) as progress:
        for event in events():
            progress.on_event(event)
        raise KeyboardInterrupt
    assert screen.show_cursor() is True  # the screen is the user's again
    assert "garden" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_kind_of_progress_follows_the_console() -> None:
    assert isinstance(make_progress(Console(file=io.StringIO())), PlainProgress)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(make_progress(terminal), LiveProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.3, "12 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s")]
    + [(7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    values = (12345, 0.123456, 1e-7, True, "x", 2.0)
    assert [number(v) for v in values] == ["12,345", "0.1235", "1e-07", "True", "x", "2"]


def test_key_metrics_take_the_first_numbers_and_leave_names_whole() -> None:
    values = {"epoch": 3, "v": {"dense": {"min_dcf_0.01": 0.5, "eer": 0.1}}, "a": 1, "b": 2}
    assert key_metrics(values) == "dense min_dcf_0.01=0.5  dense eer=0.1  a=1"

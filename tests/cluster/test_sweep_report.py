"""The report of a sweep: drawings from results made by hand, everything escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.sweep_drawings import draw_history
from goldcrest.cluster.sweep_record import SweepRecord, SweepResult, TrialResult
from goldcrest.cluster.sweep_report import height, importance, render
from goldcrest.cluster.sweep_space import Axis, Space

SPACE = Space.parse(
    {
        "learn.rate": {"loguniform": [0.001, 1.0]},
        "learn.depth": {"randint": [1, 6]},
        "learn.kind": {"choice": ["plain", "<script>x</script>"]},
        "fixed": {"choice": [1]},
    }
)


def trials(count: int, mode: str = "min") -> list[TrialResult]:
    """Only the depth matters: the metric is the depth, or its negative."""
    made = []
    for number, config in enumerate(SPACE.random_points(count, 0)):
        depth = float(config["learn.depth"])
        metric = depth if mode == "min" else -depth
        trial = TrialResult(number=number, config=config, run=f"s-{number:03d}")
        trial.state, trial.metric, trial.scores = "succeeded", metric, [(1, -2.0), (5, -1.0)]
        made.append(trial)
    return made


def result(found: list[TrialResult], **more: Any) -> SweepResult:
    facts: dict[str, Any] = {
        "sweep": "s", "pipeline": "toy", "metric": "a.b", "mode": "min", "status": "succeeded",
        "seconds": 75.0, "trials": found,
    }  # fmt: skip
    return SweepResult(**(facts | more))


def test_only_what_matters_is_important() -> None:
    shares = dict(importance(trials(30), SPACE))
    assert set(shares) == {"learn.rate", "learn.depth", "learn.kind"}  # a fixed field has no share
    assert shares["learn.depth"] > 0.9
    assert sum(shares.values()) == pytest.approx(1.0)
    assert importance(trials(30), SPACE) == list(shares.items())  # seeded
    assert importance(trials(7), SPACE) == []


def test_heights_on_an_axis() -> None:
    assert height(SPACE.axes["learn.rate"], 0.001) == 0.0
    assert height(SPACE.axes["learn.rate"], 1.0) == 1.0
    assert height(SPACE.axes["learn.rate"], 0.0316228) == pytest.approx(0.5, abs=1e-3)
    assert [height(SPACE.axes["learn.depth"], v) for v in (1, 3, 5)] == [0.0, 0.5, 1.0]
    assert height(SPACE.axes["learn.kind"], "plain") == 0.0
    assert height(Axis(choice=(7,)), 7) == 0.5


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_line_is_the_best_trial(tmp_path: Path, mode: str) -> None:
    found = trials(12, mode)
    page = render(tmp_path, result(found, mode=mode), SPACE)
    golden = re.findall(r'class="trial rank0"[^>]*><title>trial (\d+)', page)
    lowest = min(t.config["learn.depth"] for t in found)
    best = [str(t.number) for t in found if t.config["learn.depth"] == lowest]
    assert sorted(golden, key=int) == best
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_report_of_nothing_and_of_one_trial(tmp_path: Path) -> None:
    assert "there are 0" in render(tmp_path, result([], status="failed"), SPACE)
    page = render(tmp_path, result(trials(1)), SPACE)
    assert page.count('class="trial rank') == 1


def test_history_keeps_the_best_so_far() -> None:
    drawing = str(draw_history([(0, 3.0), (1, 1.0), (2, 2.0)], best_is_low=True, title="t"))
    points = re.search(r'class="curve" points="([^"]*)"', drawing)
    assert points is not None
    heights = [float(pair.split(",")[1]) for pair in points[1].split()]
    assert heights == sorted(heights)  # down the page, never up again
    assert heights[-1] == heights[-2] == max(heights)


def test_a_record_is_read_up_to_what_is_damaged(tmp_path: Path) -> None:
    record = SweepRecord(tmp_path)
    found = trials(4)
    found[1].state = "stopped"
    for trial in (found[0], found[1], found[3]):  # number 2 is missing
        record.note(trial)
    with (tmp_path / "trials.jsonl").open("a") as stream:
        stream.write('{"number": 2, "config": {"learn.rate": 5}, "scores": [], "state": "x"}\n')
        stream.write('{"number": 2, "conf')
    points, stopped = record.earlier(SPACE)
    assert points == [found[0].config, found[1].config]
    assert stopped.keys() == {1}
    assert stopped[1].scores == [(1, -2.0), (5, -1.0)]
    (tmp_path / "trials.jsonl").write_bytes(b"\xff\x00\n[1]\n7\n")
    assert record.earlier(SPACE) == ([], {})

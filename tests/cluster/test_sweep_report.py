"""The report of a sweep: drawings from results made by hand, everything escaped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.sweep_drawings import draw_history
from goldcrest.cluster.sweep_level_drawing import Point
from goldcrest.cluster.sweep_levels import MOST_CURVES, charts
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


LOSSES = Space.parse(
    {"seed": {"grid": [0, 1]}, "prune.loss": {"grid": ["plain", "<b>"]}, "fixed": {"choice": [1]}}
)


def by_level(seed: int, loss: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trial of LOSSES, better with the second loss; `bytes` has no interval: no result."""

    def told(level: int) -> dict[str, Any]:
        score = 100 - level + seed + (10 if loss == "<b>" else 0)
        return {"bleu": score, "bleu_ci": [score - 1, score + 1], "bytes": 7, "cost": float(level)}

    models = {"dense": {"bleu": 99 + seed}, **{f"sparse_{n}": told(n) for n in (90, 50)}}
    return {"seed": seed, "prune.loss": loss, "fixed": 1}, {"language": models, "other": {"n": 1}}


def test_results_by_level_are_curves_over_the_settings() -> None:
    measured = [by_level(seed, loss) for seed in (0, 1) for loss in ("plain", "<b>")]
    (bleu,) = charts(measured, LOSSES, "language.sparse_50.bleu")
    assert bleu.title == "language.sparse_*.bleu"
    assert bleu.beside == {"dense": 99.5}
    assert bleu.curves == {
        "loss: plain": (
            Point(level=50, mean=50.5, low=50, high=51),
            Point(level=90, mean=10.5, low=10, high=11),
        ),
        "loss: <b>": (
            Point(level=50, mean=60.5, low=60, high=61),
            Point(level=90, mean=20.5, low=20, high=21),
        ),
    }
    # The metric comes first, without an interval too; below another word there is nothing.
    titles = [chart.title for chart in charts(measured, LOSSES, "language.sparse_90.cost")]
    assert titles == ["language.sparse_*.cost", "language.sparse_*.bleu"]
    assert charts(measured, LOSSES, "other.n") == []
    fallen = by_level(0, "plain")
    fallen[1]["language"] = {"sparse_50": {"bleu": math.inf}}
    assert charts([*measured, fallen], LOSSES, "language.sparse_50.bleu") == [bleu]
    many = Space.parse({"rate": {"uniform": [0, 1]}})
    drawn = [({"rate": n / 10}, by_level(0, "plain")[1]) for n in range(MOST_CURVES + 1)]
    assert charts(drawn, many, "language.sparse_50.bleu") == []
    assert len(charts(drawn[1:], many, "language.sparse_50.bleu")[0].curves) == MOST_CURVES


def test_the_report_draws_the_curves_and_reads_them_again(tmp_path: Path) -> None:
    found = []
    for number, (config, metrics) in enumerate(by_level(0, loss) for loss in ("plain", "<b>")):
        trial = TrialResult(number=number, config=config, run=f"s-{number:03d}")
        trial.state, trial.metric, trial.metrics = "succeeded", 50.0 + number, metrics
        found.append(trial)
    told = result(found, metric="language.sparse_50.bleu", mode="max")
    page = render(tmp_path / "s", told, LOSSES)
    assert page.count('class="whisker"') == 4
    assert "language.sparse_*.bleu" in page
    assert "loss: &lt;b&gt;, 50: 60 (60 to 60)" in page
    for trial in found:  # as a sweep's record keeps them: without what they measured
        folder = tmp_path / trial.run
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"metrics": trial.metrics}))
        trial.metrics = {}
    assert render(tmp_path / "s", told, LOSSES).count('class="whisker"') == 4
    (tmp_path / "s-000" / "result.json").write_text("{")
    assert render(tmp_path / "s", told, LOSSES).count('class="whisker"') == 2


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

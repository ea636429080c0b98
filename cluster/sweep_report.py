"""The report of a sweep: one HTML file that needs nothing beside itself, like the report of a run.

Parallel coordinates (every trial through its values), results by level, history (the metric by
trial, the best so far), importance of the fields, the watched curves, all trials with links to
their own reports.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from goldcrest.cluster.api import canonical_json
from goldcrest.cluster.masking import mask_secrets
from goldcrest.cluster.report import REPORT, fill_page, show, write_text
from goldcrest.cluster.report_drawings import draw_curve
from goldcrest.cluster.sweep_drawings import (
    RANKS,
    Column,
    Line,
    draw_bars,
    draw_history,
    draw_parallel,
)
from goldcrest.cluster.sweep_level_drawing import draw_levels
from goldcrest.cluster.sweep_levels import charts
from goldcrest.cluster.sweep_record import SweepRecord, SweepResult, TrialResult
from goldcrest.cluster.sweep_space import Axis, Space

LEAST_TRIALS = 8
"""Finished trials below which an importance would be a guess."""
_MOST_CURVES = 12
_MOST_TICKS = 8


def write_report(folder: Path, result: SweepResult, space: Space) -> Path:
    """Write `report.html` into the sweep's folder; returns its path."""
    path = folder / REPORT
    write_text(path, render(folder, result, space))
    return path


def render_again(folder: Path) -> str:
    """The report of a sweep that has ended, from its record; InputError if that can't be read."""
    return render(folder, *SweepRecord(folder).ended())


def render(folder: Path, result: SweepResult, space: Space) -> str:
    """The report as HTML text."""
    finished = [trial for trial in result.trials if trial.metric is not None]
    states = [trial.state for trial in result.trials]
    best = Path(result.best_config).read_text(encoding="utf-8") if result.best_config else ""
    bars = importance(finished, space)
    facts = mask_secrets(result.as_json())
    return fill_page(
        "sweep_template.html",
        result=facts,
        best=facts["best"],
        counts={state: states.count(state) for state in dict.fromkeys(states)},
        fields=list(space.axes),
        trials=[_row(folder, trial) for trial in facts["trials"]],
        parallel=_parallel(finished, result, space),
        levels=[
            draw_levels(chart)
            for chart in charts(
                [(trial.config, _metrics(folder, trial)) for trial in finished],
                space,
                result.metric,
            )
        ],
        history=draw_history(
            [(trial.number, float(trial.metric or 0.0)) for trial in finished],
            best_is_low=result.mode == "min",
            title=f"{result.metric}, the best so far as a line",
        ),
        importance=draw_bars(bars, "importance of the fields"),
        no_importance="no field changed the metric"
        if len(finished) >= LEAST_TRIALS
        else f"told from {LEAST_TRIALS} finished trials on; there are {len(finished)}",
        finished=len(finished),
        curves=[
            draw_curve(f"trial {trial.number}", trial.scores)
            for trial in result.trials[:_MOST_CURVES]
            if len(trial.scores) > 1
        ],
        best_yaml=best,
        folder=str(folder),
    )


def _row(folder: Path, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's line of the table; its own report is linked where there is one."""
    report = folder.parent / str(trial["run"]) / REPORT
    return {
        **trial,
        "cells": [_label(value) for value in trial["config"].values()],
        "report": f"../{trial['run']}/{REPORT}" if report.is_file() else "",
    }


def _metrics(folder: Path, trial: TrialResult) -> Mapping[str, Any]:
    """What the trial measured: of a sweep that is read again, as its run has written it."""
    if trial.metrics:
        return trial.metrics
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((folder.parent / trial.run / "result.json").read_text(encoding="utf-8"))
        if isinstance(told, dict) and isinstance(told.get("metrics"), dict):
            return told["metrics"]
    return {}


def _label(value: Any) -> str:
    return show(value) if isinstance(value, int | float) else canonical_json(value).strip('"')


# ------------------------------------------------------------------------ parallel coordinates


def _parallel(finished: Sequence[TrialResult], result: SweepResult, space: Space) -> Markup:
    varied = {path: axis for path, axis in space.axes.items() if axis.size > 1}
    if not finished or not varied:
        return Markup("")
    values = [float(trial.metric or 0.0) for trial in finished]
    low, high = min(values), max(values)
    order = sorted(values, reverse=result.mode == "max")
    columns = [_column(path, axis) for path, axis in varied.items()]
    ticks = ((0.0, show(low)), (1.0, show(high))) if high > low else ((0.5, show(low)),)
    columns.append(Column(title=result.metric, ticks=ticks))
    lines = []
    for trial, value in zip(finished, values, strict=True):
        heights = [height(axis, trial.config[path]) for path, axis in varied.items()]
        heights.append((value - low) / (high - low) if high > low else 0.5)
        place = order.index(value)
        lines.append(
            Line(
                heights=tuple(heights),
                rank=min(RANKS - 1, math.ceil(place * RANKS / len(order))),
                name=f"trial {trial.number}: {show(value)}",
            )
        )
    return draw_parallel(columns, lines)


def _column(path: str, axis: Axis) -> Column:
    values = axis.ends()
    if len(values) > _MOST_TICKS:
        values = [values[0], values[-1]]
    shown = mask_secrets({path: list(values)})[path]
    ticks = zip(values, shown, strict=True)
    return Column(title=path, ticks=tuple((height(axis, v), _label(text)) for v, text in ticks))


def height(axis: Axis, value: Any) -> float:
    """Where a value stands on its axis, in [0, 1]: by place in a list, by logarithm if that."""
    code = float(axis.encode(value))
    if axis.listed:
        return code / (len(axis.listed) - 1) if len(axis.listed) > 1 else 0.5
    low, high = (float(end) for end in axis.ends())
    if axis.loguniform:
        low, high, code = math.log(low), math.log(high), math.log(code)
    return (code - low) / (high - low) if high > low else 0.5


# --------------------------------------------------------------------------------- importance


def importance(finished: Sequence[TrialResult], space: Space) -> list[tuple[str, float]]:
    """How much each field matters for the metric, as shares of 1; [] where that can't be told.

    Permutation importance (Breiman 2001) in a forest of extremely randomised trees that has learnt
    metric from values. Seeded: the same trials give the same shares.
    """
    import numpy as np

    paths = [
        path
        for path in space.axes
        if len({canonical_json(trial.config[path]) for trial in finished}) > 1
    ]
    if len(finished) < LEAST_TRIALS or not paths:
        return []
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.inspection import permutation_importance

    x = np.array([[height(space.axes[p], t.config[p]) for p in paths] for t in finished])
    y = np.array([t.metric for t in finished])
    forest = ExtraTreesRegressor(n_estimators=100, random_state=0).fit(x, y)
    losses = permutation_importance(forest, x, y, n_repeats=10, random_state=0).importances_mean
    positive = np.maximum(losses, 0.0)
    if not positive.sum() > 0:
        return []
    shares = positive / positive.sum()
    return [(path, float(share)) for path, share in zip(paths, shares, strict=True)]

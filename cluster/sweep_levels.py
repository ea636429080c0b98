"""What a sweep measured at several levels, as curves: a study's accuracy against sparsity.

Numbers whose paths differ in one trailing number are one quantity at several levels:
`language.sparse_50.bleu` and `language.sparse_90.bleu` are `language.sparse_*.bleu` at 50 and 90. A
curve is one setting of the swept fields; trials that differ only in their seed are averaged. What
stands beside the levels (`language.dense.bleu`) is what the curves are compared with.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from goldcrest.cluster.config_file import flatten
from goldcrest.cluster.report import show
from goldcrest.cluster.sweep_level_drawing import Chart, Point
from goldcrest.cluster.sweep_space import Space, Values
from goldcrest.cluster.sweep_trial import numbers

MOST_CURVES = 6
"""Settings that one chart can tell apart by colour."""
MOST_CHARTS = 8
_LEVEL = re.compile(r"(?<=_)\d+(?=\.)")


def charts(
    measured: Sequence[tuple[Values, Mapping[str, Any]]], space: Space, metric: str
) -> list[Chart]:
    """Charts of what was measured at two levels or more, the quantity of `metric` first.

    `measured` holds (swept values, nested metrics) of each finished trial. Of the other quantities
    those under the metric's first word are drawn that have intervals (`bleu_ci`): what a pipeline
    calls a result. [] where nothing has levels, or the settings are more than a chart can show.
    """
    by_setting: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for values, metrics in measured:
        by_setting[_setting(values, space)].append(numbers(metrics))
    if len(by_setting) > MOST_CURVES:
        return []
    wanted = _wanted([metrics for _, metrics in measured], metric)
    drawn = (_chart(template, by_setting) for template in wanted)
    several = [chart for chart in drawn if max(map(len, chart.curves.values()), default=0) > 1]
    return several[:MOST_CHARTS]


def _setting(values: Values, space: Space) -> str:
    """The trial's values but for its seed, in words."""
    words = [
        f"{path.rpartition('.')[2]}: {show(value) if isinstance(value, int | float) else value}"
        for path, value in values.items()
        if space.axes[path].size > 1 and path.rpartition(".")[2] != "seed"
    ]
    return ", ".join(words) or "all trials"


def _template(path: str) -> tuple[str, int] | None:
    """`a.sparse_50.bleu` -> (`a.sparse_*.bleu`, 50); None for a path without a level."""
    match = _LEVEL.search(path)
    if match is None:
        return None
    return f"{path[: match.start()]}*{path[match.end() :]}", int(match[0])


def _wanted(measured: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Templates in the order they are drawn in."""
    own = _template(metric)
    found = [own[0]] if own else []
    root = metric.partition(".")[0]
    for metrics in measured:
        leaves = flatten(dict(metrics))
        for path in leaves:
            parts = _template(path)
            if parts and path.startswith(f"{root}.") and f"{path}_ci" in leaves:
                found.append(parts[0])
    return list(dict.fromkeys(found))


def _chart(template: str, by_setting: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    curves = {}
    beside: dict[str, list[float]] = defaultdict(list)
    # What stands in the place of `sparse_*`.
    before, after = template.split("*")
    place = re.compile(re.escape(before[: before.rfind(".") + 1]) + r"([^.]+)" + re.escape(after))
    for name, trials in by_setting.items():
        levels: dict[int, list[float]] = defaultdict(list)
        for told in trials:
            for path, value in told.items():
                match = place.fullmatch(path)
                parts = _template(path)
                if not math.isfinite(value):
                    continue  # a model that fell apart has no place on an axis
                if parts and parts[0] == template:
                    levels[parts[1]].append(value)
                elif match and not parts:
                    beside[match[1]].append(value)
        if levels:
            curves[name] = tuple(
                Point(level=level, mean=statistics.fmean(found), low=min(found), high=max(found))
                for level, found in sorted(levels.items())
            )
    means = {name: statistics.fmean(found) for name, found in beside.items()}
    return Chart(title=template, curves=curves, beside=means)

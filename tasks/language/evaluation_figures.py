"""Figures of an evaluation: quality against sparsity, quality against bytes.

Models are named by how they were made: "sparse_75" belongs to the family "sparse" and stands at its
own measured sparsity. A family is a line; what has no percentage in its name is a point.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from goldcrest.tasks.language.quality import LOWER_IS_BETTER, ON_TOKENS

_PERCENT = re.compile(r"^(?P<family>.+)_\d+(?:\.\d+)?$")
Values = Mapping[str, Mapping[str, Any]]


def shown_metrics(language: Values) -> list[str]:
    """What is drawn, a panel each: perplexity, and the task metrics of the models that have any."""
    named = {
        name: None for values in language.values() for name in values if f"{name}_ci" in values
    }
    tasks = [name for name in named if name not in ON_TOKENS]
    return (["perplexity"] if "perplexity" in named else []) + tasks


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what stands before their percentage, in order; others are families of one."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _PERCENT.match(name)
        found.setdefault(match["family"] if match else name, []).append(name)
    return found


def by_sparsity(language: Values, sizes: Values, metrics: Sequence[str]) -> Any:
    """Each metric with its interval against the share of zeros, a line per family."""
    figure, panels = _panels(metrics)
    for axes, metric in zip(panels, metrics, strict=True):
        for family, names in families(list(language)).items():
            there = sorted(
                (name for name in names if metric in language[name]),
                key=lambda name: sizes[name]["sparsity"],
            )
            if there:
                zeros = [100 * sizes[name]["sparsity"] for name in there]
                _draw(axes, zeros, [language[name] for name in there], metric, family)
        axes.set(xlabel="zeros among the weights (%)", ylabel=_label(metric))
        axes.legend(loc="best", fontsize="small") if len(language) < 20 else None
    return figure


def by_size(language: Values, sizes: Values, metrics: Sequence[str]) -> Any:
    """Each metric with its interval against the bundle's bytes, a named point per model."""
    figure, panels = _panels(metrics)
    for axes, metric in zip(panels, metrics, strict=True):
        for name, values in language.items():
            if metric in values:
                size = sizes[name]["bytes"] / 1e6
                _draw(axes, [size], [values], metric, name)
                axes.annotate(
                    name, (size, values[metric]), (4, 4), textcoords="offset points", fontsize=7
                )
        axes.set(xlabel="bundle (MB)", ylabel=_label(metric), xscale="log")
    return figure


def _panels(metrics: Sequence[str]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(metrics), 3.8))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.subplots_adjust(wspace=0.35)
    return figure, panels


def _draw(
    axes: Any, places: Sequence[float], values: Sequence[Mapping[str, Any]], metric: str, label: str
) -> None:
    """A line through values, with their intervals as bars."""
    heights = [each[metric] for each in values]
    bars = [[], []]  # type: list[list[float]]
    for height, (low, high) in zip(heights, (each[f"{metric}_ci"] for each in values), strict=True):
        bars[0].append(max(0.0, height - low))
        bars[1].append(max(0.0, high - height))
    axes.errorbar(places, heights, bars, label=label, marker="o", markersize=4, capsize=2)


def _label(metric: str) -> str:
    return f"{metric} ({'lower' if metric in LOWER_IS_BETTER else 'higher'} is better)"

"""The drawings of a sweep's report as inline SVG: parallel coordinates, history, importance.

Pure functions from plain values to `Markup`, in the manner of `report_drawings`: every text is
escaped, colours come from the page's CSS. Lengths are in SVG user units (pixels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from goldcrest.cluster.report_drawings import svg

RANKS = 5
"""Groups by rank that lines are coloured in; 0 is the best."""
_MOST_LINES = 400  # drawn; more would be one grey area
_LABEL = 18  # characters of a label


@dataclass(frozen=True, kw_only=True)
class Column:
    """One vertical axis: its title and its labelled ticks, each at a height in [0, 1]."""

    title: str
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One trial: a height in [0, 1] per column, the rank of its metric (0 is best), its name."""

    heights: tuple[float, ...]
    rank: int
    name: str


def draw_parallel(columns: Sequence[Column], lines: Sequence[Line]) -> Markup:
    """Parallel coordinates: a line per trial through its place on every axis, the best on top."""
    if len(columns) < 2 or not lines:
        return Markup("")
    gap, top, height, margin = 170.0, 44.0, 240.0, 90.0
    width = 2 * margin + gap * (len(columns) - 1)
    parts = []
    for line in sorted(lines, key=lambda line: -line.rank)[-_MOST_LINES:]:
        points = " ".join(
            f"{margin + index * gap:.1f},{top + (1 - at) * height:.1f}"
            for index, at in enumerate(line.heights)
        )
        parts.append(
            Markup(
                '<polyline class="trial rank{rank}" points="{points}"><title>{name}</title>'
                "</polyline>"
            ).format(rank=line.rank, points=points, name=line.name)
        )
    for index, column in enumerate(columns):
        parts.append(_column(column, margin + index * gap, top, height))
    return svg(width, top + height + 20, parts, "every trial through its values", "parallel")


def _column(column: Column, x: float, top: float, height: float) -> Markup:
    body = [
        Markup(
            '<line class="rail" x1="{x}" x2="{x}" y1="{y1}" y2="{y2}"/>'
            '<text class="name" x="{x}" y="20"><title>{whole}</title>{title}</text>'
        ).format(
            x=f"{x:.1f}",
            y1=f"{top:.1f}",
            y2=f"{top + height:.1f}",
            whole=column.title,
            title=_short(column.title.rpartition(".")[2]),
        )
    ]
    for at, label in column.ticks:
        y = top + (1 - at) * height
        body.append(
            Markup('<text class="axis" x="{x}" y="{y}">{label}</text>').format(
                x=f"{x - 6:.1f}", y=f"{y + 4:.1f}", label=_short(label)
            )
        )
    return Markup("").join(body)


def draw_history(values: Sequence[tuple[int, float]], *, best_is_low: bool, title: str) -> Markup:
    """The metric of each finished trial by its number, and the best so far as a line."""
    values = [(number, value) for number, value in values if math.isfinite(value)]
    if not values:
        return Markup("")
    width, height, left, right, top, bottom = 640.0, 220.0, 70.0, 16.0, 30.0, 30.0
    low, high = min(v for _, v in values), max(v for _, v in values)
    span = (high - low) or 1.0
    last = max(1, max(number for number, _ in values))

    def at(number: float, value: float) -> tuple[float, float]:
        x = left + number / last * (width - left - right)
        up = (value - low) / span if high > low else 0.5
        return x, height - bottom - up * (height - top - bottom)

    steps: list[str] = []
    best = values[0][1]
    for number, value in values:
        before = best
        best = min(best, value) if best_is_low else max(best, value)
        steps += ["{:.1f},{:.1f}".format(*at(number, level)) for level in (before, best)]
    dots = [
        Markup('<circle class="dot" cx="{x}" cy="{y}" r="3.5"><title>{t}</title></circle>').format(
            x=f"{x:.1f}", y=f"{y:.1f}", t=f"trial {number}: {value:.6g}"
        )
        for (number, value), (x, y) in ((pair, at(*pair)) for pair in values)
    ]
    frame = Markup(
        '<text class="title" x="{l}" y="14">{title}</text>'
        '<line class="grid" x1="{l}" x2="{r}" y1="{b}" y2="{b}"/>'
        '<line class="grid" x1="{l}" x2="{r}" y1="{t}" y2="{t}"/>'
        '<text class="axis" x="{la}" y="{t}">{high}</text>'
        '<text class="axis" x="{la}" y="{b}">{low}</text>'
        '<text class="tick start" x="{l}" y="{h}">trial 0</text>'
        '<text class="tick end" x="{r}" y="{h}">trial {last}</text>'
        '<polyline class="curve" points="{line}"/>'
    ).format(
        l=left,
        r=width - right,
        t=top,
        b=height - bottom,
        la=left - 8,
        h=height - 8,
        high=f"{high:.4g}",
        low=f"{low:.4g}",
        last=last,
        title=title,
        line=" ".join(steps),
    )
    return svg(width, height, [frame, *dots], title, "history")


def draw_bars(shares: Sequence[tuple[str, float]], title: str) -> Markup:
    """Shares in [0, 1] as horizontal bars, largest first."""
    if not shares:
        return Markup("")
    left, row, width = 260.0, 26.0, 640.0
    scale = width - left - 60
    parts = []
    for index, (name, share) in enumerate(sorted(shares, key=lambda pair: -pair[1])):
        y = 4 + index * row
        parts.append(
            Markup(
                '<text class="label" x="{lx}" y="{ty}">{name}</text>'
                '<rect class="bar" x="{l}" y="{y}" width="{w}" height="16" rx="4"/>'
                '<text class="fact left" x="{vx}" y="{ty}">{value}</text>'
            ).format(
                lx=left - 10,
                ty=f"{y + 13:.1f}",
                name=name if len(name) <= 38 else f"…{name[-37:]}",
                l=left,
                y=f"{y:.1f}",
                w=f"{max(2.0, share * scale):.1f}",
                vx=f"{left + max(2.0, share * scale) + 8:.1f}",
                value=f"{100 * share:.0f} %",
            )
        )
    return svg(width, 8 + row * len(shares), parts, title, "importance")


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"

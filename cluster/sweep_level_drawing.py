"""A quantity against its level as inline SVG, for the report of a sweep.

A pure function from plain values to `Markup`, in the manner of `report_drawings`: every text is
escaped, colours come from the page's CSS. Lengths are in SVG user units (pixels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from goldcrest.cluster.report_drawings import svg


@dataclass(frozen=True, kw_only=True)
class Point:
    """The trials of one setting at one level: their mean, the lowest and the highest."""

    level: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity: its curves by setting, and the means of what has no level by name."""

    title: str
    curves: Mapping[str, tuple[Point, ...]]
    beside: Mapping[str, float]


def draw_levels(chart: Chart) -> Markup:
    """A quantity against its level: a curve per setting with the range of its trials as whiskers,
    dashed lines for what has no level, the names below.
    """
    values = [end for points in chart.curves.values() for p in points for end in (p.low, p.high)]
    values += chart.beside.values()
    levels = sorted({point.level for points in chart.curves.values() for point in points})
    frame = _Frame(levels[0], levels[-1], min(values), max(values))
    parts = [frame.draw(chart.title, levels)]
    for series, (name, points) in enumerate(chart.curves.items()):
        parts.append(_series(frame, series, name, points))
    parts += [
        Markup('<line class="beside" x1="{l}" x2="{r}" y1="{y}" y2="{y}"/>').format(
            l=frame.left, r=frame.right, y=f"{frame.y(value):.1f}"
        )
        + Markup('<text class="tick end" x="{r}" y="{y}">{name} {value}</text>').format(
            r=frame.right, y=f"{frame.y(value) - 4:.1f}", name=name[:18], value=f"{value:.4g}"
        )
        for name, value in chart.beside.items()
    ]
    height = frame.bottom + 34 + 18 * len(chart.curves)
    return svg(frame.right + 16, height, parts, chart.title, "levels")


class _Frame:
    """Where numbers stand in a chart, and its rails."""

    left, right, top, bottom = 60.0, 420.0, 30.0, 250.0

    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        self._x = (first, (last - first) or 1.0)
        self._y = (low, (high - low) or 1.0)

    def x(self, level: float) -> float:
        first, span = self._x
        return self.left + 16 + (level - first) / span * (self.right - self.left - 32)

    def y(self, value: float) -> float:
        low, span = self._y
        return self.bottom - 10 - (value - low) / span * (self.bottom - self.top - 20)

    def draw(self, title: str, levels: Sequence[int]) -> Markup:
        """The title, the lowest and the highest value, and the levels."""
        low, span = self._y
        body = [
            Markup('<text class="title" x="0" y="14">{title}</text>').format(title=title),
            Markup('<line class="rail" x1="{l}" x2="{l}" y1="{t}" y2="{b}"/>').format(
                l=self.left, t=self.top, b=self.bottom
            ),
        ]
        for value in dict.fromkeys((low, low + span)):
            body.append(
                Markup(
                    '<line class="grid" x1="{l}" x2="{r}" y1="{y}" y2="{y}"/>'
                    '<text class="axis" x="{x}" y="{ty}">{value}</text>'
                ).format(
                    l=self.left,
                    r=self.right,
                    y=f"{self.y(value):.1f}",
                    x=self.left - 6,
                    ty=f"{self.y(value) + 4:.1f}",
                    value=f"{value:.4g}",
                )
            )
        for level in levels:
            body.append(
                Markup('<text class="tick" x="{x}" y="{y}">{level}</text>').format(
                    x=f"{self.x(level):.1f}", y=self.bottom + 14, level=level
                )
            )
        return Markup("").join(body)


def _series(frame: _Frame, series: int, name: str, points: Sequence[Point]) -> Markup:
    """One curve, its whiskers and its line of the legend."""
    line = " ".join(f"{frame.x(p.level):.1f},{frame.y(p.mean):.1f}" for p in points)
    body = [
        Markup('<polyline class="curve" points="{line}"><title>{name}</title></polyline>').format(
            line=line, name=name
        )
    ]
    for point in points:
        told = f"{point.mean:.4g} ({point.low:.4g} to {point.high:.4g})"
        body.append(
            Markup(
                '<line class="whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
                '<circle class="dot" cx="{x}" cy="{y}" r="3.5"><title>{told}</title></circle>'
            ).format(
                x=f"{frame.x(point.level):.1f}",
                low=f"{frame.y(point.low):.1f}",
                high=f"{frame.y(point.high):.1f}",
                y=f"{frame.y(point.mean):.1f}",
                told=f"{name}, {point.level}: {told}",
            )
        )
    y = frame.bottom + 36 + 18 * series
    legend = Markup(
        '<circle class="dot" cx="{l}" cy="{y}" r="4.5"/><text class="fact left" x="{x}" y="{ty}">'
        "{name}</text>"
    ).format(l=frame.left, y=y - 4, x=frame.left + 12, ty=y, name=name[:70])
    return Markup('<g class="series{n}">{body}{legend}</g>').format(
        n=series, body=Markup("").join(body), legend=legend
    )

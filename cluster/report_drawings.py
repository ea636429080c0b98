"""The drawings of the HTML report as inline SVG: the DAG, the timeline, small curves.

Pure functions from plain values to `Markup`; every text is escaped, colours come from the page's
CSS (classes), so that the drawings follow light and dark. Lengths are in SVG user units (pixels).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NODE_WIDTH, NODE_HEIGHT = 168, 46
GAP_X, GAP_Y = 26, 40
_SWEEPS = 8


# ------------------------------------------------------------------------------------- the DAG


def layers(edges: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Layer of each step: 0 without inputs, else one below its deepest input (longest path).

    `edges` maps every step to the steps it reads from. Raises ValueError on a cycle.
    """
    found: dict[str, int] = {}
    open_steps: set[str] = set()

    def visit(step: str) -> int:
        if step in found:
            return found[step]
        if step in open_steps:
            raise ValueError(f"step '{step}' depends on itself")
        open_steps.add(step)
        found[step] = 1 + max((visit(above) for above in edges.get(step, ())), default=-1)
        open_steps.discard(step)
        return found[step]

    for step in edges:
        visit(step)
    return found


def draw_dag(edges: Mapping[str, Sequence[str]], facts: Mapping[str, tuple[str, str]]) -> Markup:
    """The steps top to bottom, in layers, long edges led around other steps.

    `facts` maps a step to its state (a CSS class) and a short second line.
    """
    rank = layers(edges)
    if not rank:
        return Markup("")
    rows, chains = _with_bends(edges, rank)
    _order(rows, chains)
    width = max(len(row) for row in rows) * (NODE_WIDTH + GAP_X) + GAP_X
    place: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        left = (width - len(row) * (NODE_WIDTH + GAP_X) + GAP_X) / 2
        for index, name in enumerate(row):
            x = left + index * (NODE_WIDTH + GAP_X) + NODE_WIDTH / 2
            place[name] = (x, GAP_Y / 2 + depth * (NODE_HEIGHT + GAP_Y) + NODE_HEIGHT / 2)
    height = len(rows) * (NODE_HEIGHT + GAP_Y)
    parts = [_edge([place[name] for name in chain]) for chain in chains]
    for step in rank:
        parts.append(_node(step, *facts.get(step, ("waiting", "")), *place[step]))
    return svg(width, height, parts, "the steps and what they read", "dag")


def _with_bends(
    edges: Mapping[str, Sequence[str]], rank: Mapping[str, int]
) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of names and chains of names: an edge over several layers gets a bend in each."""
    rows: list[list[str]] = [[] for _ in range(1 + max(rank.values()))]
    for step, depth in rank.items():
        rows[depth].append(step)
    chains: list[list[str]] = []
    for step, inputs in edges.items():
        for above in dict.fromkeys(inputs):
            chain = [above]
            for depth in range(rank[above] + 1, rank[step]):
                bend = f"\0{above}\0{depth}"  # shared by all edges from this step
                if bend not in rows[depth]:
                    rows[depth].append(bend)
                chain.append(bend)
            chains.append([*chain, step])
    return rows, chains


def _order(rows: list[list[str]], chains: Iterable[Sequence[str]]) -> None:
    """Sort each row by the mean place of its neighbours, up and down a few times, in place."""
    neighbours: dict[str, set[str]] = {}
    for chain in chains:
        for one, two in itertools.pairwise(chain):
            neighbours.setdefault(one, set()).add(two)
            neighbours.setdefault(two, set()).add(one)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for depth in order:
            beside = rows[depth - 1] if down else rows[depth + 1]
            at = {name: index / max(1, len(beside) - 1) for index, name in enumerate(beside)}
            own = {name: index for index, name in enumerate(rows[depth])}
            means = {}
            for name in rows[depth]:
                seen = [at[other] for other in neighbours.get(name, ()) if other in at]
                means[name] = sum(seen) / len(seen) if seen else 0.5
            rows[depth].sort(key=lambda name: (means[name], own[name]))


def _edge(points: Sequence[tuple[float, float]]) -> Markup:
    half = NODE_HEIGHT / 2
    x, y = points[0][0], points[0][1] + half
    path = [f"M{x:.1f} {y:.1f}"]
    for index, (next_x, next_y) in enumerate(points[1:], start=1):
        top = next_y - half
        middle = (y + top) / 2
        path.append(f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {top:.1f}")
        x, y = next_x, top
        if index < len(points) - 1:
            y = next_y + half
            path.append(f"L{x:.1f} {y:.1f}")
    return Markup('<path class="edge" d="{}"/>').format(" ".join(path))


def _node(step: str, state: str, line: str, x: float, y: float) -> Markup:
    name = step if len(step) <= 22 else f"{step[:21]}…"
    return Markup(
        '<g class="node {state}"><title>{step}: {state} {line}</title>'
        '<rect x="{left}" y="{top}" width="{w}" height="{h}" rx="9"/>'
        '<text class="name" x="{x}" y="{y1}">{name}</text>'
        '<text class="fact" x="{x}" y="{y2}">{line}</text></g>'
    ).format(
        state=state,
        step=step,
        line=line,
        left=f"{x - NODE_WIDTH / 2:.1f}",
        top=f"{y - NODE_HEIGHT / 2:.1f}",
        w=NODE_WIDTH,
        h=NODE_HEIGHT,
        x=f"{x:.1f}",
        y1=f"{y - 3:.1f}",
        y2=f"{y + 14:.1f}",
        name=name,
    )


def svg(width: float, height: float, parts: Iterable[Markup], label: str, kind: str) -> Markup:
    """The frame of a drawing: `label` for those who cannot see it, `kind` is its CSS class."""
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {w:.0f} {h:.0f}" style="max-width:{w:.0f}px" role="img" '
        'aria-label="{label}">{body}</svg>'
    ).format(kind=kind, w=width, h=height, label=label, body=Markup("").join(parts))


# -------------------------------------------------------------------------------- the timeline


@dataclass(frozen=True, kw_only=True)
class Span:
    """One bar of the timeline: seconds since the run began."""

    step: str
    state: str
    begin: float
    end: float
    text: str


def draw_timeline(spans: Sequence[Span], total: float) -> Markup:
    """When each step ran, one bar a step, over `total` seconds."""
    if not spans:
        return Markup("")
    left, right, row, width = 170.0, 130.0, 26.0, 900.0
    total = max(total, max(span.end for span in spans), 1e-3)
    scale = (width - left - right) / total
    height = len(spans) * row + 34
    parts = []
    for tick in ticks(total):
        x = left + tick * scale
        parts.append(
            Markup(
                '<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{y}"/>'
                '<text class="tick" x="{x}" y="{t}">{s}</text>'
            ).format(x=f"{x:.1f}", y=f"{height - 26:.1f}", t=f"{height - 10:.1f}", s=_clock(tick))
        )
    for index, span in enumerate(spans):
        y = 6 + index * row
        x, length = left + span.begin * scale, max(3.0, (span.end - span.begin) * scale)
        parts.append(
            Markup(
                '<text class="label" x="{lx}" y="{ty}">{step}</text>'
                '<rect class="bar {state}" x="{x}" y="{y}" width="{w}" height="16" rx="4">'
                "<title>{step}: {text}</title></rect>"
                '<text class="fact left" x="{fx}" y="{ty}">{text}</text>'
            ).format(
                lx=f"{left - 10:.1f}",
                ty=f"{y + 12.5:.1f}",
                step=span.step,
                state=span.state,
                x=f"{x:.1f}",
                y=f"{y:.1f}",
                w=f"{length:.1f}",
                fx=f"{x + length + 7:.1f}",
                text=span.text,
            )
        )
    return svg(width, height, parts, "when each step ran", "timeline")


def ticks(total: float, most: int = 7) -> list[float]:
    """At most `most` round values from 0 to `total` (steps of 1, 2, 5 x 10^k, or of minutes)."""
    rough = total / max(1, most - 1)
    minutes = [60.0 * m for m in (1, 2, 5, 10, 15, 30, 60, 120, 240, 480, 1440)]
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    decimal = [m * power for m in (1, 2, 5, 10)]
    steps = minutes if 30 <= rough <= minutes[-1] else decimal
    step = next((s for s in steps if s >= rough), steps[-1])
    return [index * step for index in range(int(total / step + 1e-9) + 1)]


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    if seconds < 3600:
        return f"{seconds / 60:g} min"
    return f"{seconds / 3600:.3g} h"


# ---------------------------------------------------------------------------------- the curves


def draw_curve(name: str, points: Sequence[tuple[float, float]]) -> Markup:
    """A small line chart of (x, y) points with the range of both axes and the last value."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return Markup("")
    width, height, left, right, top, bottom = 280.0, 130.0, 46.0, 10.0, 26.0, 20.0
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / span_x if high_x > low_x else 0.5
        up = (y - low_y) / span_y if high_y > low_y else 0.5
        return left + across * (width - left - right), height - bottom - up * (
            height - top - bottom
        )

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    last_x, last_y = at(*points[-1])
    body = Markup(
        '<text class="title" x="0" y="13">{name}</text>'
        '<text class="last" x="{w}" y="13">{last}</text>'
        '<line class="grid" x1="{l}" x2="{r}" y1="{b}" y2="{b}"/>'
        '<line class="grid" x1="{l}" x2="{r}" y1="{t}" y2="{t}"/>'
        '<text class="axis" x="{la}" y="{ta}">{high}</text>'
        '<text class="axis" x="{la}" y="{b}">{low}</text>'
        '<text class="tick start" x="{l}" y="{h}">{first}</text>'
        '<text class="tick end" x="{r}" y="{h}">{final}</text>'
        '<polyline class="curve" points="{line}"/><circle class="dot" cx="{cx}" cy="{cy}" r="3"/>'
    ).format(
        name=name,
        last=f"{points[-1][1]:.4g}",
        w=width - right,
        l=left,
        r=width - right,
        b=height - bottom,
        t=top,
        la=left - 6,
        ta=top + 8,
        high=f"{high_y:.4g}",
        low=f"{low_y:.4g}",
        h=height - 5,
        first=f"{low_x:g}",
        final=f"{high_x:g}",
        line=line,
        cx=f"{last_x:.1f}",
        cy=f"{last_y:.1f}",
    )
    return svg(width, height, [body], name, "chart")

"""The curves of a training, as a figure: what every step that trains shows in its report."""

from __future__ import annotations

from typing import Any


def history_figure(history: list[dict[str, float]]) -> Any:
    """The curves of a history over epochs, one small panel per quantity."""
    from matplotlib.figure import Figure

    names = sorted({name for row in history for name in row} - {"epoch"})
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9, 2.0 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row.get("epoch", n), row[name]) for n, row in enumerate(history) if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize="small")
        axis.tick_params(labelsize="x-small")
    figure.tight_layout()
    return figure

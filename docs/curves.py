"""Draws docs/sparsity.svg, the task's metric against the share of zeros, from docs/figures.csv.

python docs/curves.py
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).resolve().parent
# A row that is a curve: "language, TASK, 50 / 70 % zeros ..., METRIC of N ... (dense 80.8): LOSS".
NAME = re.compile(
    r"language, (?P<task>[^,]+), (?P<levels>[\d /]+) % zeros.*, (?P<metric>\w+) of (?P<of>\d+ \w+)"
    r", three seeds \(dense (?P<dense>[\d.]+)\): (?P<loss>.+)"
)
STYLES = {
    "cross-entropy": ("tab:gray", "o"),
    "cross-entropy + KL": ("tab:blue", "s"),
    "cross-entropy + SquareHead": ("tab:orange", "D"),
}

Curve = dict[str, list[float]]  # sparsity in percent -> the metric of each seed
Panels = dict[str, dict[str, Curve]]  # title -> loss -> curve


def read(path: Path) -> tuple[Panels, dict[str, float]]:
    """The curves of a figures.csv by panel, and the dense model's metric of each panel."""
    panels: Panels = {}
    dense: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            found = NAME.fullmatch(row["name"])
            if found is None:
                continue
            unit = f" ({row['unit']})" if row["unit"] else ""
            title = f"{found['task']}: {found['metric']} of {found['of']}{unit}"
            levels = found["levels"].split(" / ")
            seeds = re.findall(r"\(([^)]*)\)", row["value"])
            values = [[float(value) for value in each.split(", ")] for each in seeds]
            panels.setdefault(title, {})[found["loss"]] = dict(zip(levels, values, strict=True))
            dense[title] = float(found["dense"])
    return panels, dense


def draw(axes: Axes, title: str, curves: dict[str, Curve], dense: float) -> None:
    """A panel: the mean of the seeds of each loss, bars from the lowest to the highest seed."""
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense (teacher)")
    axes.axhspan(dense * 0.99, dense, color="black", alpha=0.08, linewidth=0, label="within 1 %")
    for step, (loss, curve) in enumerate(curves.items()):
        colour, marker = STYLES[loss]
        means = [mean(seeds) for seeds in curve.values()]
        apart = [float(level) + 0.6 * (step - 1) for level in curve]  # bars beside each other
        below = [middle - min(seeds) for middle, seeds in zip(means, curve.values(), strict=True)]
        above = [max(seeds) - middle for middle, seeds in zip(means, curve.values(), strict=True)]
        axes.errorbar(
            apart, means, [below, above], label=loss, color=colour, marker=marker, capsize=2
        )
    axes.set(title=title, xlabel="zeros among the blocks' weights (%)")
    axes.grid(alpha=0.3)


def main() -> None:
    """Write the picture; its description holds the numbers, so that a test can compare them."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "goldcrest"  # the same ids each time
    panels, dense = read(FOLDER / "figures.csv")
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        draw(axes, title, curves, dense[title])
    figure.axes[0].legend(fontsize="small")
    metadata = {"Description": json.dumps({"curves": panels, "dense": dense}), "Date": None}
    figure.savefig(FOLDER / "sparsity.svg", metadata=metadata)


if __name__ == "__main__":
    main()

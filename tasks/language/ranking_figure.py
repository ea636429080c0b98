"""The figure of what compression harms most: operations or layers by score, the worst on top."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 40  # names in the figure, the worst


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Names from the highest score to the lowest, equal ones by name."""
    return sorted(scores, key=lambda name: (-scores[name], name))


def ranking_figure(
    scores: Mapping[str, float], *, title: str, label: str, marked: Container[str] = ()
) -> Figure:
    """Bars of the highest scores (what they are says `label`); those in `marked` are red."""
    from matplotlib.figure import Figure

    shown: Sequence[str] = ranked(scores)[:_SHOWN][::-1]
    figure = Figure(figsize=(7.0, 1.2 + 0.18 * len(shown)))
    axes = figure.add_subplot()
    colours = ["#c0504d" if name in marked else "#4f81bd" for name in shown]
    axes.barh(shown, [scores[name] for name in shown], color=colours)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel(label)
    axes.set_title(title)
    return figure

"""What steps that train share: a batch that fits the corpus, the figure of the history."""

from __future__ import annotations

from typing import Any

from goldcrest.cluster.api import TrainingConfig


def fitting(training: TrainingConfig, examples: int) -> TrainingConfig:
    """The config with a batch of at most `examples`: a larger one would never be filled."""
    if training.batch_size <= examples:
        return training
    return training.model_copy(update={"batch_size": examples, "micro_batch_size": None})


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

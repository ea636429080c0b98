"""Choose clusters: how many clusters the training vectors hold, by stability, without labels.

Source: Ben-Hur, Elisseeff & Guyon 2002; Lange et al. 2004 (kernels/clustering/selection.py): the
number whose partition of random subsamples is found again best.

Artifact: clusters.json (the choice and the stability of every candidate), the figure `stability`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.methods import SettingsOf, settings_of
from goldcrest.tasks.speaker.vectors import read_vectors

_AHC = "goldcrest.kernels.clustering.ahc"
_SELECTION = "goldcrest.kernels.clustering.selection"


class ChooseClustersConfig(Config):
    """The search, and the dendrogram that it cuts."""

    ahc: Annotated[dict[str, Any], SettingsOf(_AHC, "Settings")] = Field(
        {}, description="agglomerative clustering of the subsamples"
    )
    search: Annotated[dict[str, Any], SettingsOf(_SELECTION, "StabilitySettings")] = Field(
        {}, description="subsamples and candidate numbers of clusters"
    )


@task(cpus=1, timeout="6h")
def choose_clusters(cfg: ChooseClustersConfig, vectors: Artifact, out: Output) -> None:
    """The number of clusters of the training vectors."""
    import torch

    from goldcrest.kernels.clustering.selection import number_of_clusters

    found = read_vectors(vectors, "train")
    if len(found.ids) < 8:
        raise StepError(
            f"{len(found.ids)} training utterances are too few to choose a number of clusters",
            hint="give clustering.clusters a number, or give more speech",
        )
    clusters, stability = number_of_clusters(
        torch.from_numpy(found.matrix).float(),
        settings_of(_AHC, "Settings", cfg.ahc),
        seed=out.seed,
        search=settings_of(_SELECTION, "StabilitySettings", cfg.search),
    )
    out.json(
        "clusters",
        {"clusters": clusters, "stability": {str(c): value for c, value in stability.items()}},
    )
    out.metrics(choice={"clusters": clusters, "stability": stability[clusters]})
    out.figure("stability", _figure(stability, clusters))


def _figure(stability: dict[int, float], clusters: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    tried = sorted(stability)
    axes.semilogx(tried, [stability[c] for c in tried], marker="o", markersize=3)
    axes.axvline(clusters, linestyle="--", linewidth=1, label=f"chosen: {clusters}")
    axes.set(xlabel="clusters", ylabel="agreement of subsamples (AMI)")
    axes.legend(fontsize="small")
    return figure

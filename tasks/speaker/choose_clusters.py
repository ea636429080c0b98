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
    oversegment: float = Field(
        1.0,
        gt=0,
        description="clusters asked for per stable one; above 1 helps CIMC, which leaves clusters "
        "empty but cannot make more (the study: 10,000 for 5,994 speakers)",
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
    stable, stability = number_of_clusters(
        torch.from_numpy(found.matrix).float(),
        settings_of(_AHC, "Settings", cfg.ahc),
        seed=out.seed,
        search=settings_of(_SELECTION, "StabilitySettings", cfg.search),
    )
    clusters = max(2, min(round(cfg.oversegment * stable), len(found.ids) // 2))
    curve = {str(count): value for count, value in stability.items()}
    out.json("clusters", {"clusters": clusters, "stable": stable, "stability": curve})
    out.metrics(choice={"clusters": clusters, "stable": stable, "stability": stability[stable]})
    out.figure("stability", _figure(stability, stable))


def _figure(stability: dict[int, float], clusters: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    tried = sorted(stability)
    axes.semilogx(tried, [stability[c] for c in tried], marker="o", markersize=3)
    axes.axvline(clusters, linestyle="--", linewidth=1, label=f"chosen: {clusters}")
    axes.set(xlabel="clusters", ylabel="agreement of subsamples (AMI)")
    axes.legend(loc="lower right", fontsize="small")
    return figure

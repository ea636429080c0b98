"""The speaker pipeline: a folder of unlabelled speech -> small, fast speaker verification models.

    corpus -> features -> ivectors -> cluster -> pretrain -> sparse -> int8 -> evaluate -> bundles
                                   \\-> kmeans, ahc (to compare with)

With `rounds` above 1 the network's embeddings are clustered again and the network is trained anew
on those labels. With `pretrain.labels` the corpus's own speakers are the labels: the upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from goldcrest.cluster import api
from goldcrest.cluster.profile import StepResources
from goldcrest.tasks.speaker.choose_clusters import ChooseClustersConfig, choose_clusters
from goldcrest.tasks.speaker.choose_labels import (
    CandidatesConfig,
    ChooseLabelsConfig,
    choose_labels,
)
from goldcrest.tasks.speaker.cluster import ClusterConfig, cluster
from goldcrest.tasks.speaker.embed import EmbedConfig, embed
from goldcrest.tasks.speaker.evaluate import EvaluateConfig, evaluate
from goldcrest.tasks.speaker.features import FeatureConfig, features
from goldcrest.tasks.speaker.ivector import IvectorConfig, ivector
from goldcrest.tasks.speaker.network import check_int8_skips, check_pruning_skips
from goldcrest.tasks.speaker.prepare import PrepareConfig, prepare
from goldcrest.tasks.speaker.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.speaker.publish import PublishConfig, publish
from goldcrest.tasks.speaker.quantize import QuantizeConfig, quantize
from goldcrest.tasks.speaker.sparse_finetune import SparseConfig, sparse_finetune
from goldcrest.tasks.speaker.true_labels import TrueLabelsConfig, true_labels

DESCRIPTION = "unlabelled speech to dense, sparse and INT8 speaker verification models"


class Config(api.Config):
    """The configs of the steps, in the order of the chain."""

    seed: int = Field(0, ge=0, description="seed of every random choice in the run")
    rounds: int = Field(
        1, ge=1, le=5, description="times that vectors are clustered and a network is trained"
    )
    steps: dict[str, StepResources] = Field(
        {},
        description="patterns of step names -> resources and timeout in place of the tasks' own; "
        "what a cluster profile says goes first",
    )
    corpus: PrepareConfig = Field(PrepareConfig(), description="which speech, how it is cut")
    features: FeatureConfig = Field(FeatureConfig(), description="MFCC, filterbanks, augmentation")
    ivector: IvectorConfig = Field(IvectorConfig(), description="i-vector extractor")
    choice: ChooseClustersConfig = Field(
        ChooseClustersConfig(), description="number of clusters, where it is auto"
    )
    clustering: ClusterConfig = Field(ClusterConfig(), description="pseudo-labels")
    candidates: CandidatesConfig = Field(
        CandidatesConfig(),
        description="variants of `clustering` that are tried; the labels that agree best with a "
        "reference are taken, without any truth",
    )
    compare: tuple[ClusterConfig, ...] = Field(
        (), description="other clusterings of the same i-vectors, to compare with"
    )
    pretrain: PretrainConfig = Field(PretrainConfig(), description="the dense network")
    embed: EmbedConfig = Field(EmbedConfig(), description="embeddings between rounds")
    sparse: SparseConfig = Field(SparseConfig(), description="pruning and sparse fine-tuning")
    quantize: QuantizeConfig = Field(QuantizeConfig(), description="INT8 weights and activations")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="trials and measurements")
    publish: PublishConfig = Field(PublishConfig(), description="the finished bundles")

    @model_validator(mode="after")
    def _one_classifier(self) -> Self:
        for name in ("margin", "min_cluster"):
            dense, sparse = getattr(self.pretrain, name), getattr(self.sparse, name)
            if dense != sparse:
                raise ValueError(
                    f"sparse.{name} is {sparse} but pretrain.{name} is {dense}: sparse fine-tuning "
                    "goes on with the dense network's classifier, so they must be the same"
                )
        return self

    @model_validator(mode="after")
    def _skipped_layers_exist(self) -> Self:
        """Only the network can tell, and the steps that have one come hours later."""
        skips = self.quantize.settings["skip_names"]
        for field, check, names in (
            ("sparse.skip", check_pruning_skips, self.sparse.skip),
            ("quantize.settings.skip_names", check_int8_skips, skips),
        ):
            try:
                check(self.pretrain.network, names)
            except ValueError as error:
                raise ValueError(f"field '{field}': {error}") from None
        return self

    @model_validator(mode="after")
    def _clusterings_have_names(self) -> Self:
        names = [each.label or each.method for each in (self.clustering, *self.compare)]
        if len(set(names)) < len(names):
            raise ValueError(f"two clusterings are called alike ({names}): give one a `label`")
        return self

    @model_validator(mode="after")
    def _candidates_are_settings(self) -> Self:
        self.candidates.runs(self.clustering)
        return self

    @model_validator(mode="after")
    def _one_round_of_truth(self) -> Self:
        if self.pretrain.labels and self.rounds > 1:
            raise ValueError("pretrain.labels trains once on true labels: leave rounds at 1")
        return self


def build(cfg: Config) -> list[Any]:
    """Bind the chain; its ends are the three bundles and the clusterings compared with."""
    corpus = prepare.bind(cfg.corpus, name="corpus", seed=cfg.seed)
    frames = features.bind(cfg.features, corpus, seed=cfg.seed)
    vectors = ivector.bind(cfg.ivector, frames, name="ivectors", seed=cfg.seed)
    count = None
    clusterings = (cfg.clustering, *cfg.compare, cfg.candidates.reference)
    if any(each.clusters == "auto" for each in clusterings):
        count = choose_clusters.bind(cfg.choice, vectors, seed=cfg.seed)
    clusterer = _Clusterer(cfg, corpus, count)
    compared = [(each, clusterer.one(each, vectors)) for each in cfg.compare]
    if cfg.pretrain.labels:
        labels = true_labels.bind(TrueLabelsConfig(), corpus, name="labels")
    else:
        labels = clusterer.best(cfg.clustering, vectors, compared)
    dense = pretrain.bind(cfg.pretrain, frames, labels, seed=cfg.seed)
    for number in range(2, cfg.rounds + 1):
        again = embed.bind(cfg.embed, dense, frames, name=f"embed-{number}")
        labels = clusterer.best(cfg.clustering, again, [], suffix=f"-round-{number}")
        name = f"pretrain-round-{number}"
        dense = pretrain.bind(cfg.pretrain, frames, labels, name=name, seed=cfg.seed)
    sparse = sparse_finetune.bind(cfg.sparse, dense, frames, labels, name="sparse", seed=cfg.seed)
    int8 = quantize.bind(cfg.quantize, sparse, frames, name="int8", seed=cfg.seed)
    result = evaluate.bind(
        cfg.evaluate, corpus, frames, vectors, dense, sparse, int8, seed=cfg.seed
    )
    finished = [
        publish.bind(cfg.publish, node, result, name=f"bundle-{name}")
        for name, node in (("dense", dense), ("sparse", sparse), ("int8", int8))
    ]
    return [*(node for _, node in compared), *finished]


class _Clusterer:
    """Binds clusterings of one corpus."""

    def __init__(self, cfg: Config, corpus: Any, count: Any) -> None:
        self.cfg, self.corpus, self.count = cfg, corpus, count

    def one(self, each: ClusterConfig, vectors: Any, name: str = "", seed: int = 0) -> Any:
        """One clustering; `seed` is added to the run's."""
        name = name or f"cluster-{each.label or each.method}"
        counted = self.count if each.clusters == "auto" else None
        seed += self.cfg.seed
        return cluster.bind(each, vectors, counted, self.corpus, name=name, seed=seed)

    def best(
        self,
        base: ClusterConfig,
        vectors: Any,
        compared: Sequence[tuple[ClusterConfig, Any]],
        suffix: str = "",
    ) -> Any:
        """The clustering that is trained on: `base`, or the best of the candidates around it."""
        candidates = self.cfg.candidates
        label = (base.label or base.method) + suffix
        runs = candidates.runs(base)
        if len(runs) == 1:
            ((each, seed),) = runs.values()
            named = each.model_copy(update={"label": label})
            return self.one(named, vectors, f"cluster{suffix}", seed)
        tried = {
            name: self.one(
                each.model_copy(update={"label": each.label + suffix}),
                vectors,
                f"candidate{suffix}-{name}",
                seed,
            )
            for name, (each, seed) in runs.items()
        }
        other = candidates.reference.model_copy(update={"clusters": base.clusters})
        reference = next((node for each, node in compared if each == other), None)
        if reference is None:
            other = other.model_copy(update={"label": (other.label or other.method) + suffix})
            reference = self.one(other, vectors, f"reference{suffix}")
        return choose_labels.bind(
            ChooseLabelsConfig(label=label, candidates=candidates),
            vectors,
            reference,
            self.corpus,
            name=f"cluster{suffix}",
            **tried,
        )

"""Sparse fine-tuning: prune the dense network in one shot, then train with the masks held.

Source: Kurtic et al. 2023 (spec "sparse fine-tuning"): SparseGPT on calibration features, layer
after layer, then task loss + SquareHead distillation from the dense network. The baselines that
the study compares with are settings: `method` magnitude or wanda, `distillation` none (plain CE),
logits (KD) or feature_mse.

Artifact: the bundle `sparse`, its weights stored with bitmasks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import Artifact, Output, TrainingConfig, task
from goldcrest.tasks.history import history_figure
from goldcrest.tasks.methods import complete_method, complete_settings, settings_of
from goldcrest.tasks.speaker.bundle import load_network, read_description, write_bundle
from goldcrest.tasks.speaker.network import LossConfig, network_settings
from goldcrest.tasks.speaker.pretrain import join_state, read_examples, split_state
from goldcrest.tasks.speaker.training import check_batches, fitting

if TYPE_CHECKING:
    import torch
    from torch import nn

_SPARSITY = "goldcrest.kernels.sparsity"
_DISTILLATION = {
    "squarehead": "goldcrest.kernels.distillation.squarehead",
    "logits": "goldcrest.kernels.distillation.logit_kd",
    "feature_mse": "goldcrest.kernels.distillation.feature_mse",
}


class SparseConfig(LossConfig):
    """How much is pruned, how, and how the rest is trained."""

    sparsity: float = Field(0.75, ge=0, lt=1, description="share of zeros in every pruned layer")
    method: str = Field("sparsegpt", description="pruning method, a file of kernels/sparsity")
    settings: dict[str, Any] = Field({}, description="the method's settings (see its file)")
    skip: tuple[str, ...] = Field((), description="layers (or modules) that are not pruned")
    calibration: int = Field(256, ge=1, description="utterances whose features make the Hessian")
    distillation: Literal["none", "squarehead", "logits", "feature_mse"] = Field(
        "squarehead", description="what the dense network teaches"
    )
    distillation_settings: dict[str, Any] = Field({}, description="weight and others of that loss")
    min_cluster: int = Field(2, ge=1, description="labels with fewer utterances are left out")
    training: TrainingConfig = Field(
        TrainingConfig(epochs=10, batch_size=200, learning_rate=3e-4, schedule="linear"),
        description="the training engine",
    )

    @field_validator("training")
    @classmethod
    def _batches_normalise(cls, training: TrainingConfig) -> TrainingConfig:
        check_batches(training)
        return training

    @model_validator(mode="after")
    def _complete_methods(self) -> Self:
        completed = complete_method(_SPARSITY, self.method, self.settings)
        object.__setattr__(self, "settings", completed)
        if self.distillation in _DISTILLATION:
            module = _DISTILLATION[self.distillation]
            settings = complete_settings(module, "Settings", self.distillation_settings)
            object.__setattr__(self, "distillation_settings", settings)
        elif self.distillation_settings:
            raise ValueError("distillation_settings given, but distillation is none")
        return self


@task(cpus=0, timeout="7d", version=2)
def sparse_finetune(
    cfg: SparseConfig, dense: Artifact, features: Artifact, labels: Artifact, out: Output
) -> None:
    """Prune the dense bundle's network and fine-tune it sparse."""
    from safetensors.torch import load_file

    from goldcrest.kernels.sparsity.masks import realised_sparsity
    from goldcrest.tasks.speaker.objective import SparseObjective

    for member in ("bundle.json", "model.safetensors", "head.safetensors"):
        dense.file(member)
    description = read_description(dense.path)
    teacher = load_network(dense.path)
    head = load_file(dense.path / "head.safetensors")
    examples = read_examples(features, labels, cfg.min_cluster)
    out.progress(0.0, f"{cfg.method} to {cfg.sparsity:.0%}")
    prune = functools.partial(_pruned_state, examples=examples, cfg=cfg, seed=out.seed)
    ((state, masks),) = out.runtime.map(prune, [dense.path], note=f"prune by {cfg.method}")
    settings: dict[str, Any] = {}
    if cfg.distillation != "none":
        settings = cfg.distillation_settings
    objective = SparseObjective(
        examples,
        network=network_settings(description["network"]),
        initial=join_state(state, head),
        teacher=join_state(teacher.state_dict(), head),
        masks=masks,
        distillation=cfg.distillation,
        distillation_settings=settings_of(_DISTILLATION[cfg.distillation], "Settings", settings)
        if cfg.distillation != "none"
        else None,
        **cfg.objective_settings(),
    )
    training = fitting(cfg.training, len(objective))
    trained = out.runtime.train(objective, training, out)
    body, new_head = split_state(trained.model_state)
    pruned = load_network(dense.path)
    pruned.load_state_dict(body)
    sparsity = realised_sparsity(pruned, masks)
    out.tensors("head", new_head)
    out.json("history", trained.history)
    out.figure("history", history_figure(trained.history))
    out.measure(training={"sparse": trained.measurements})
    out.metrics(sparsity={"pruned_layers": sparsity, "layers": len(masks)})
    write_bundle(
        out,
        name="sparse",
        tensors=body,
        network=description["network"],
        front_end=description["front_end"],
        packed=[f"{name}.weight" for name in masks],
        facts={
            "classes": description["classes"],
            "base_sha256": dense.manifest["files"]["model.safetensors"]["sha256"],
            "training": {
                "pruning": cfg.method,
                "sparsity of the pruned layers": round(sparsity, 4),
                "distillation": cfg.distillation,
                "epochs": training.epochs,
            },
        },
    )


def _pruned_state(
    dense: Path, *, examples: Any, cfg: SparseConfig, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and masks of the pruned network of the bundle in `dense`; runs on a worker."""
    batches = calibration_batches(examples, cfg, seed)
    pruned, masks = prune_network(load_network(dense), batches, cfg)
    return dict(pruned.state_dict()), masks


def calibration_batches(examples: Any, cfg: SparseConfig, seed: int) -> list[torch.Tensor]:
    """Crops (B, F, L) of a seeded sample of training utterances, without masks on them."""
    import torch

    from goldcrest.kernels.frontend.crop import random_crop

    rng = np.random.default_rng([seed, 7])
    chosen = rng.permutation(len(examples.labels))[: cfg.calibration]
    crops = [
        random_crop(
            torch.from_numpy(examples.reader[int(examples.rows[index, 0])]), cfg.crop_frames[1], rng
        ).mT
        for index in chosen
    ]
    return [torch.stack(crops[start : start + 32]) for start in range(0, len(crops), 32)]


def prune_network(
    network: nn.Module, batches: list[torch.Tensor], cfg: SparseConfig
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A pruned copy of the network and the masks of its layers."""
    from goldcrest.kernels.sparsity.model import prunable, prune_model

    def calibrate(model: nn.Module) -> Iterator[None]:
        for batch in batches:
            model(batch)
            yield None

    pruned = copy.deepcopy(network)
    names = prunable(pruned, cfg.skip)
    settings = settings_of(f"{_SPARSITY}.{cfg.method}", "Settings", cfg.settings)
    masks = prune_model(pruned, names, calibrate, cfg.method, cfg.sparsity, settings)
    return pruned, masks

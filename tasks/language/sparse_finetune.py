"""Sparse fine-tuning: prune a model that is fine-tuned already, then train it with masks held.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927: SparseGPT on rows of the task (or of another corpus: C4, for the study's GPT
models), block after block, then cross-entropy + SquareHead distillation from the dense model. The
study's baselines are settings: `method` magnitude or wanda, `distillation` none (plain CE), logits
(KD) or feature_mse, `training` null (one shot).

In a gradual schedule every level is a step of its own that prunes the *fine-tuned* model of the
level before (`previous`); learning rate and warm-up start anew, the teacher stays the dense model.
Masks of SparseGPT do not nest unless its setting `keep_zeros` is on.

Artifact: the bundle `sparse_<percent>`, its weights stored with bitmasks; history and its figure.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import Artifact, Config, Output, StepError, TrainingConfig, task
from goldcrest.tasks.language.bundle import (
    load_bare,
    load_config,
    read_description,
    verified,
)
from goldcrest.tasks.language.recipe import (
    RecipeConfig,
    float_bundle,
    load_trainable,
    read_text,
    train,
    write_trained,
)
from goldcrest.tasks.methods import complete_method, complete_settings, settings_of

if TYPE_CHECKING:
    from goldcrest.tasks.language.objective import Text

_SPARSITY = "goldcrest.kernels.sparsity"
_DONE = "layers.json"
_DISTILLATION = {
    "logits": "goldcrest.kernels.distillation.logit_kd",
    "squarehead": "goldcrest.kernels.distillation.squarehead",
    "feature_mse": "goldcrest.kernels.distillation.feature_mse",
}


def check_level(sparsity: float) -> None:
    """ValueError, in a sentence, for a sparsity that leaves nothing to prune or nothing at all."""
    if sparsity <= 0:
        raise ValueError(f"sparsity {sparsity:g} prunes nothing: that is the dense model itself")
    if sparsity >= 1:
        raise ValueError(
            f"sparsity {sparsity:g} leaves no weight: give a share between 0 and 1, such as 0.75"
        )


class SparseTextConfig(RecipeConfig):
    """How much is pruned, how, and how the rest is trained."""

    sparsity: float = Field(0.75, description="share of zeros of every pruned layer, in (0, 1)")
    method: str = Field("sparsegpt", description="pruning method, a file of kernels/sparsity")
    settings: dict[str, Any] = Field({}, description="the method's settings (see its file)")
    skip: tuple[str, ...] = Field(
        (), description="layers (or modules above them) of the blocks that are not pruned"
    )
    calibration_rows: int = Field(
        512, ge=1, description="rows (of the calibration corpus) whose inputs make the Hessians"
    )
    calibration_batch: int = Field(
        8, ge=1, description="rows of a forward pass during calibration; changes no Hessian's rows"
    )
    distillation: Literal["none", "logits", "squarehead", "feature_mse"] = Field(
        "squarehead", description="what the dense model teaches"
    )
    distillation_settings: dict[str, Any] = Field({}, description="weight and others of that loss")
    task_weight: float = Field(1.0, ge=0, description="factor of the cross-entropy in the loss")
    training: TrainingConfig | None = Field(
        TrainingConfig(
            epochs=2, batch_size=32, learning_rate=3e-5, schedule="linear", warmup_steps=20
        ),
        description="the training engine; null: pruned in one shot, not trained",
    )

    @field_validator("sparsity")
    @classmethod
    def _prunes_something(cls, sparsity: float) -> float:
        check_level(sparsity)
        return sparsity

    @model_validator(mode="after")
    def _complete_methods(self) -> Self:
        completed = complete_method(_SPARSITY, self.method, self.settings)
        object.__setattr__(self, "settings", completed)
        pattern = completed.get("pattern")
        if pattern is not None and abs(pattern[0] / pattern[1] - self.sparsity) > 1e-9:
            raise ValueError(
                f"a pattern of {pattern[0]} zeros in {pattern[1]} is a sparsity of "
                f"{pattern[0] / pattern[1]:g}, not {self.sparsity:g}"
            )
        if self.distillation in _DISTILLATION:
            module = _DISTILLATION[self.distillation]
            settings = complete_settings(module, "Settings", self.distillation_settings)
            object.__setattr__(self, "distillation_settings", settings)
        elif self.distillation_settings:
            raise ValueError("distillation_settings given, but distillation is none")
        taught = self.distillation_settings.get("weight", 0.0)
        if self.training is not None and self.task_weight == 0 and taught == 0:
            raise ValueError(
                "task_weight 0 and nothing from the dense model leave no loss to train with: raise "
                "task_weight or the weight of the distillation, or set training to null"
            )
        return self


class LevelsConfig(Config):
    """A list of sparsities: branches that each prune the dense model, or a gradual schedule."""

    levels: tuple[float, ...] = Field(
        (0.5, 0.75), min_length=1, description="sparsities, each a step of its own, rising"
    )
    gradual: bool = Field(
        False, description="each level prunes the fine-tuned model of the level before"
    )
    recipe: SparseTextConfig = Field(
        SparseTextConfig(), description="every level's settings; its sparsity is the level's"
    )
    changes: dict[str, dict[str, Any]] = Field(
        {}, description='settings of single levels by percent: {"80": {training: {epochs: 4}}}'
    )

    @field_validator("recipe", mode="before")
    @classmethod
    def _pattern_says_the_sparsity(cls, recipe: Any) -> Any:
        """The recipe's own sparsity counts for nothing, so it must not contradict its pattern."""
        settings = recipe.get("settings") if isinstance(recipe, dict) else None
        pattern = settings.get("pattern") if isinstance(settings, dict) else None
        match pattern:
            case [int(zeros), int(width)] if 0 < zeros < width:
                return {**recipe, "sparsity": zeros / width}
        return recipe

    @field_validator("levels")
    @classmethod
    def _rise(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        for level in levels:
            check_level(level)
        if any(low >= high for low, high in itertools.pairwise(levels)):
            raise ValueError(f"levels must rise, not {list(levels)}")
        if len({level_name(level) for level in levels}) < len(levels):
            raise ValueError("two levels round to the same percent")
        return levels

    @model_validator(mode="after")
    def _every_level_is_valid(self) -> Self:
        known = {str(round(100 * level)) for level in self.levels}
        for percent in self.changes:
            if percent not in known:
                raise ValueError(f"changes name '{percent}'; levels are {', '.join(sorted(known))}")
        for level in self.levels:
            self.step(level)
        return self

    def step(self, level: float) -> SparseTextConfig:
        """The settings of one level's step."""
        changes = self.changes.get(str(round(100 * level)), {})
        recipe = self.recipe.model_dump()
        # Another method knows none of the settings that complete this one.
        for choice, settings in (
            ("method", "settings"),
            ("distillation", "distillation_settings"),
        ):
            if changes.get(choice, recipe[choice]) != recipe[choice]:
                recipe[settings] = {}
        merged = _merged(recipe, changes)
        return SparseTextConfig(**{**merged, "sparsity": level})


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the leaves of `changes` put in."""
    made = dict(values)
    for name, value in changes.items():
        inner = made.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, dict)
        made[name] = _merged(inner, value) if nested and inner is not None else value
    return made


def level_name(sparsity: float) -> str:
    """The name of a level's bundle: sparse_75 for 0.75."""
    return f"sparse_{round(100 * sparsity)}"


@task(cpus=0, timeout="7d", version=5)
def sparse_finetune_text(
    cfg: SparseTextConfig,
    dense: Artifact,
    tokens: Artifact,
    previous: Artifact | None,
    calibration: Artifact | None,
    out: Output,
) -> None:
    """Prune `previous` (the dense bundle, if None) and fine-tune it sparse, taught by `dense`.

    `tokens` are what it is trained on; the Hessians are made of `calibration` (those, if None).
    """
    start = dense if previous is None else previous
    folder, teacher = verified(start), verified(dense)
    description = read_description(folder)
    for artifact in (start, dense):
        float_bundle(read_description(artifact.path), artifact)
    family, config = description["family"], load_config(folder)
    read = functools.partial(
        read_text, tokenizer=folder / "tokenizer", family=family, config=config
    )
    text = read(tokens)
    given = text if calibration is None else read(calibration)
    out.progress(0.0, f"{cfg.method} to {cfg.sparsity:.0%}")
    pruned = out.scratch / "pruned"
    if not (pruned / _DONE).is_file():  # else a run that was killed has pruned already
        gpus = _pruning_gpus(cfg, out)
        device = "cuda" if gpus else "cpu"
        prune = functools.partial(
            prune_bundle, text=given, cfg=cfg, seed=out.seed, into=pruned, device=device
        )
        list(out.runtime.map(prune, [folder], gpus=gpus, note=f"prune by {cfg.method}"))
    state, history = _trained(cfg, text, folder, teacher, pruned, out)
    layers = json.loads((pruned / _DONE).read_text("utf-8"))
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in layers)
    sparsity = zeros / sum(state[f"{name}.weight"].numel() for name in layers)
    out.metrics(sparsity={"pruned_layers": sparsity, "layers": len(layers)})
    write_trained(
        out,
        name=level_name(cfg.sparsity),
        family=description["family"],
        model=load_bare(folder),
        state=state,
        tokenizer=folder / "tokenizer",
        packed=[f"{name}.weight" for name in layers],
        facts={
            "base_sha256": dense.manifest["files"]["model.safetensors"]["sha256"],
            "training": {
                **read_description(teacher).get("training", {}),
                "pruning": cfg.method,
                "sparsity of the pruned layers": round(sparsity, 4),
                "distillation": cfg.distillation,
                "sparse fine-tuning epochs": len(history),
            },
        },
    )


def _pruning_gpus(cfg: SparseTextConfig, out: Output) -> float:
    """GPUs that the worker which prunes asks for: as one that trains does, and before they start.

    The step itself declares cpus=0, so it holds none that its workers could wait for.
    """
    configured = cfg.training.gpus_per_worker if cfg.training else 0.0
    return out.runtime.gpus or configured


def _trained(
    cfg: SparseTextConfig, text: Text, folder: Path, teacher: Path, pruned: Path, out: Output
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """State after fine-tuning with the masks held, and its history; as pruned, without training."""
    from safetensors.torch import load_file

    from goldcrest.tasks.language.objective import SparseObjective

    weights = pruned / "weights.safetensors"
    if cfg.training is None:
        return load_file(weights), []
    settings = None
    if cfg.distillation != "none":
        module = _DISTILLATION[cfg.distillation]
        settings = settings_of(module, "Settings", cfg.distillation_settings)
    objective = SparseObjective(
        text,
        start=functools.partial(load_trainable, folder, weights),
        teacher=None if cfg.distillation == "none" else teacher,
        masks=pruned / "masks.safetensors",
        distillation=cfg.distillation,
        distillation_settings=settings,
        task_weight=cfg.task_weight,
        activation_checkpointing=cfg.activation_checkpointing,
        evaluation_rows=cfg.evaluation_rows,
    )
    trained = train(objective, cfg.training, out)
    out.measure(training={level_name(cfg.sparsity): trained.measurements})
    return trained.model_state, trained.history


def check_prunable(cfg: SparseTextConfig, model: Any) -> None:
    """StepError for a model (on "meta", too) that has no layers to be pruned so."""
    from goldcrest.kernels.language import pruning

    try:
        pruning.check_prunable(model, skip=cfg.skip, pattern=cfg.settings.get("pattern"))
    except ValueError as error:
        raise _refused(cfg, error) from error


def _refused(cfg: SparseTextConfig, error: ValueError) -> StepError:
    return StepError(f"pruning by {cfg.method} to {cfg.sparsity:.0%}: {error}")


def prune_bundle(
    folder: Path,
    *,
    text: Text,
    cfg: SparseTextConfig,
    seed: int,
    into: Path,
    device: str = "cpu",
) -> None:
    """Prune the model of a bundle; weights, masks and layer names go into a folder, the names last.

    Runs on a worker. On a GPU (`device` "cuda") there is one block of the model at a time with the
    batch that it reads, the rest stays in the CPU's memory. Weights stay on disk, where every
    training process reads them, instead of travelling with the objective.
    """
    from safetensors.torch import save_file

    from goldcrest.kernels.language.architectures import own_state
    from goldcrest.kernels.language.pruning import prune_blocks
    from goldcrest.tasks.language.objective import write_masks

    model = load_trainable(folder)
    inputs, source, target = calibration_batches(text, model, cfg, seed)
    try:
        masks = prune_blocks(
            model,
            inputs,
            source=source,
            target=target,
            method=cfg.method,
            sparsity=cfg.sparsity,
            settings=settings_of(f"{_SPARSITY}.{cfg.method}", "Settings", cfg.settings),
            skip=cfg.skip,
            device=device,
        )
    except ValueError as error:
        raise _refused(cfg, error) from error
    into.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in own_state(model).items()}
    save_file(tensors, into / "weights.safetensors")
    write_masks(into / "masks.safetensors", masks)
    (into / _DONE).write_text(json.dumps(list(masks)), "utf-8")


def calibration_batches(
    text: Text, model: Any, cfg: SparseTextConfig, seed: int
) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """A seeded sample of the text's training rows as inputs of the model, with token masks (B, T)
    of what an encoder and what a decoder (or the only stack) reads; rows of like length together.
    """
    from goldcrest.kernels.language.losses import NO_LOSS
    from goldcrest.kernels.language.padding import token_mask
    from goldcrest.tasks.language.documents import check_reading
    from goldcrest.tasks.language.objective import model_inputs

    check_reading(model, text.collate, text.train)
    rng = np.random.default_rng([seed, 7])
    sample = rng.permutation(len(text.train))[: cfg.calibration_rows]
    order = sample[np.argsort(text.train.lengths[sample], kind="stable")]
    inputs, source, target = [], [], []
    for start in range(0, len(order), cfg.calibration_batch):
        rows = [text.train[int(index)] for index in order[start : start + cfg.calibration_batch]]
        batch = text.collate(rows, rng)
        inputs.append(model_inputs(model, batch))
        source.append(token_mask(batch))
        decoder = batch["labels"] != NO_LOSS
        target.append(decoder if model.config.is_encoder_decoder else token_mask(batch))
    return inputs, source, target

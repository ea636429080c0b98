"""Fine-tune: the dense model on the rows of a task. What comes out is the teacher of its sparse
copies (Kurtic et al., arXiv 2310.06927, section 3).

Artifact: the bundle `dense` (see bundle.py), history and its figure.
"""

from __future__ import annotations

import functools

from pydantic import Field

from goldcrest.cluster.api import Artifact, InputError, Output, TrainingConfig, task
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


class FinetuneConfig(RecipeConfig):
    """Training on the task."""

    training: TrainingConfig = Field(
        TrainingConfig(
            epochs=2, batch_size=32, learning_rate=3e-5, schedule="linear", warmup_steps=20
        ),
        description="the training engine (the study's settings for MPT-7B on GSM8K)",
    )


@task(cpus=0, timeout="7d")
def finetune(cfg: FinetuneConfig, base: Artifact, tokens: Artifact, out: Output) -> None:
    """Train the base bundle's model on the task's rows and write the bundle `dense`."""
    from goldcrest.tasks.language.objective import LanguageObjective

    folder = verified(base)
    description = read_description(folder)
    float_bundle(description, base)
    if description["packed"]:
        raise InputError(
            f"the bundle '{description['name']}' is sparse: dense training would fill its zeros",
            hint="fine-tune the dense bundle, or go on with sparse fine-tuning",
        )
    family, config = description["family"], load_config(folder)
    text = read_text(tokens, folder / "tokenizer", family, config)
    objective = LanguageObjective(
        text,
        start=functools.partial(load_trainable, folder),
        activation_checkpointing=cfg.activation_checkpointing,
        evaluation_rows=cfg.evaluation_rows,
    )
    trained = train(objective, cfg.training, out)
    out.measure(training={"dense": trained.measurements})
    write_trained(
        out,
        name="dense",
        family=description["family"],
        model=load_bare(folder),
        state=trained.model_state,
        tokenizer=folder / "tokenizer",
        facts={
            "base_sha256": base.manifest["files"]["model.safetensors"]["sha256"],
            "training": {
                **description.get("training", {}),
                "fine-tuning rows": len(objective),
                "fine-tuning epochs": cfg.training.epochs,
            },
        },
    )

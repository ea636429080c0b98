"""Pretrain: a language model from nothing, further from a trained one, or a trained one as it is.

    model: {architecture: llama, settings: {...}}      from nothing
    model: {path: FOLDER}                              further
    model: {path: FOLDER}, training: null              as it is: only turned into a bundle

Artifact: the bundle `dense` (see bundle.py), history and its figure.
"""

from __future__ import annotations

import functools
from typing import Any, Self

from pydantic import Field, model_validator

from goldcrest.cluster.api import Artifact, Output, TrainingConfig, task
from goldcrest.tasks.language.models import (
    ModelConfig,
    build_model,
    load_generation,
    model_config,
)
from goldcrest.tasks.language.recipe import (
    RecipeConfig,
    read_text,
    train,
    write_trained,
)
from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder


class PretrainConfig(RecipeConfig):
    """Model and training."""

    model: ModelConfig = Field(ModelConfig(), description="what training starts from")
    training: TrainingConfig | None = Field(
        TrainingConfig(
            epochs=1,
            batch_size=32,
            learning_rate=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            schedule="cosine",
            warmup_steps=100,
            clip_norm=1.0,
        ),
        description="the training engine; null: the model stays as it was loaded",
    )

    @model_validator(mode="after")
    def _is_trained(self) -> Self:
        if self.training is None and self.model.source is None:
            raise ValueError("training is null, but the model is fresh: give model.path or hub")
        return self


@task(cpus=0, timeout="30d")
def pretrain(
    cfg: PretrainConfig, tokenizer: Artifact, tokens: Artifact | None, out: Output
) -> None:
    """Train (or load) the model and write the bundle `dense`; only training looks at `tokens`."""
    from goldcrest.kernels.language.architectures import bare_model
    from goldcrest.tasks.language.objective import LanguageObjective

    folder = tokenizer_folder(tokenizer)
    config = model_config(cfg.model, load_tokenizer(folder))
    facts: dict[str, Any] = {"start": _start(cfg.model)}
    state = None
    if cfg.training is None:
        model = build_model(cfg.model, config)
    else:
        assert tokens is not None, "the chain gives tokens to a step that trains"
        model = bare_model(config, cfg.model.family)
        if (said := load_generation(cfg.model)) is not None:
            model.generation_config = said
        text = read_text(tokens, folder, cfg.model.family, config)
        objective = LanguageObjective(
            text,
            start=functools.partial(build_model, cfg.model, config),
            activation_checkpointing=cfg.activation_checkpointing,
            evaluation_rows=cfg.evaluation_rows,
        )
        trained = train(objective, cfg.training, out)
        out.measure(training={"pretrain": trained.measurements})
        state = trained.model_state
        facts |= {"pretraining rows": len(objective), "pretraining epochs": cfg.training.epochs}
    write_trained(
        out,
        name="dense",
        family=cfg.model.family,
        model=model,
        state=state,
        tokenizer=folder,
        facts={"training": facts},
    )


def _start(model: ModelConfig) -> str:
    """What training started from, without names of places: equal content makes equal bundles."""
    if model.hub is not None:
        return f"{model.hub} at {model.revision or 'main'} of the Hugging Face hub"
    return "fresh" if model.path is None else "a trained model"

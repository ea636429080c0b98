"""What the steps that train a language model share: settings, rows, the bundle that they write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    InputError,
    Output,
    StepError,
    Trained,
    TrainingConfig,
)
from goldcrest.tasks.history import history_figure
from goldcrest.tasks.language.bundle import write_bundle
from goldcrest.tasks.language.rows import check_speech, open_rows, rows_file
from goldcrest.tasks.language.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from goldcrest.tasks.data.tokens import TokenReader
    from goldcrest.tasks.language.objective import LanguageObjective, Text


class RecipeConfig(Config):
    """How a step trains, beside the engine's own settings."""

    activation_checkpointing: Annotated[bool, DoesNotChangeResult] = Field(
        False,
        description="keep only the inputs of each block for the backward pass and compute the "
        "rest again: memory of one block's activations, a third more arithmetic",
    )
    evaluation_rows: int = Field(
        256, ge=1, description="rows of each split that are evaluated after every epoch"
    )


def read_text(tokens: Artifact, tokenizer: Path, family: str, config: PreTrainedConfig) -> Text:
    """The rows of a tokens artifact for a model of the family and of that configuration.

    Raises InputError where they were made for another family, are none, do not fit the model's
    positions, or where the family needs what the tokenizer or this version lacks.
    """
    from goldcrest.tasks.language.collator import make_collator
    from goldcrest.tasks.language.objective import Text

    made_for = tokens.json("facts")["family"]
    if made_for != family:
        raise InputError(
            f"the tokens were made for the family '{made_for}', the model is '{family}'",
            hint=f"set tokens.family to {family}",
        )
    collate = make_collator(family, load_tokenizer(tokenizer), config)
    train, validation = (
        open_rows(rows_file(tokens, split), family) for split in ("train", "validation")
    )
    if len(train) == 0:
        raise StepError("the tokens hold no training rows", hint="look at the corpus")
    text = Text(train=train, validation=validation, collate=collate)
    # The test rows too: what can't be evaluated in the end is not worth training for.
    for reader in (train, validation, open_rows(rows_file(tokens, "test"), family)):
        check_lengths(reader, family, config)
        check_speech(reader, config)
    return text


def check_lengths(
    reader: TokenReader,
    family: str,
    config: PreTrainedConfig,
    calibration_length: int | None = None,
) -> None:
    """InputError for rows that are longer than what the model has positions for.

    Of rows that are to be cut to `calibration_length`, what is left of them counts.
    """
    from goldcrest.kernels.language.architectures import longest_text

    most = longest_text(config)
    parts = [reader.lengths]
    if family == "seq2seq":
        parts = [reader.predicted, reader.lengths - reader.predicted]
    longest = max(int(each.max(initial=0)) for each in parts)
    if calibration_length is not None:
        longest = min(longest, calibration_length)
    if most is not None and longest > most:
        lower = "tokens.length" if calibration_length is None else f"calibration_length to {most}"
        raise InputError(
            f"a row has {longest} tokens, the model {config.model_type} positions for {most}",
            hint=f"lower {lower}, or give the model more positions",
        )


def fitting(training: TrainingConfig, rows: int) -> TrainingConfig:
    """The config with a batch of at most `rows`: a larger one would never be filled."""
    if training.batch_units is not None or training.batch_size <= rows:
        return training
    return training.model_copy(update={"batch_size": rows, "micro_batch_size": None})


def train(objective: LanguageObjective, training: TrainingConfig, out: Output) -> Trained:
    """Run the engine and write the history of it."""
    trained = out.runtime.train(objective, fitting(training, len(objective)), out)
    out.json("history", trained.history)
    out.figure("history", history_figure(trained.history))
    return trained


def load_trainable(folder: Path, state: Path | None = None) -> PreTrainedModel:
    """A bundle's model to go on with, with the weights in the file `state` where one is given."""
    from safetensors.torch import load_file

    from goldcrest.tasks.language.bundle import load_model

    model = load_model(folder)
    if state is not None:
        model.load_state_dict(load_file(state), strict=False, assign=True)
        model.tie_weights()
    return model


def float_bundle(description: Mapping[str, Any], bundle: Artifact) -> None:
    """InputError for a bundle that can't be trained further because its weights are codes."""
    if description.get("quantization") is not None:
        raise InputError(
            f"the bundle '{description['name']}' of {bundle.step} is quantized: its weights are "
            "codes, which gradients can't move",
            hint="train the dense bundle, then quantize",
        )


def write_trained(
    out: Output,
    *,
    name: str,
    family: str,
    model: PreTrainedModel,
    state: Mapping[str, Any] | None,
    tokenizer: Path,
    facts: Mapping[str, Any],
    packed: list[str] | None = None,
) -> None:
    """The bundle of a trained `state` of `model` (its own weights, if None)."""
    from goldcrest.kernels.language.architectures import own_state

    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    write_bundle(
        out,
        name=name,
        family=family,
        config=model.config,
        tensors=own_state(model, state),
        tokenizer=tokenizer,
        facts=facts,
        packed=packed,
        generation=generation,
    )

"""What can be told of a model before it is trained: can it be pruned and quantized as asked?

A model is laid out on the device "meta", without memory for its weights, and asked what the steps
that come after its training would ask. One that is named on the hub can't be looked at from here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import InputError, StepError
from goldcrest.tasks.language.models import ModelConfig
from goldcrest.tasks.language.quantize_int4 import Int4Config, check_layers
from goldcrest.tasks.language.quantize_int8 import QuantizeInt8Config, check_quantizable
from goldcrest.tasks.language.sparse_finetune import SparseTextConfig, check_prunable
from goldcrest.tasks.methods import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKED = (
    "goldcrest.kernels.language.pruning",
    "goldcrest.kernels.quantization.int8_transformer",
    "goldcrest.kernels.sparsity.hessian",
    "goldcrest.kernels.weight_only.transformer",
    "goldcrest.tasks.language.layout",
)
"""Whose folders hold all that an answer depends on; where one has changed, it is asked anew."""


def check_layout(
    model: ModelConfig,
    recipes: Sequence[SparseTextConfig],
    int8: QuantizeInt8Config | None,
    int4: Int4Config | None,
) -> None:
    """ValueError, in the words of the step that would raise it, for a model that is not made so."""
    values = _values(model)
    if values is None or not (recipes or int8 or int4):
        return

    def ask() -> bool:
        if (bare := _bare(model, values)) is not None:
            _check(bare, model.family, recipes, int8, int4)
        return True

    pruned = [[each.method, each.settings.get("pattern"), each.skip] for each in recipes]
    eight = int8 and [int8.settings["attention"], int8.settings["skip_names"]]
    four = int4 and [int4.group_sizes, int4.ragged, int4.high_precision]
    start = [model.path is None, model.architecture, model.family, values]
    remembered([start, pruned, eight, four, version("transformers")], _ASKED, ask)


def _check(
    bare: PreTrainedModel,
    family: str,
    recipes: Sequence[SparseTextConfig],
    int8: QuantizeInt8Config | None,
    int4: Int4Config | None,
) -> None:
    field = "sparse"
    try:
        for recipe in recipes:
            check_prunable(recipe, bare)
        field = "int4"
        if int4 is not None:
            check_layers(int4, bare)
        field = "int8"
        if int8 is not None:
            check_quantizable(int8, bare, family)
    except (InputError, StepError) as error:
        raise ValueError(f"field '{field}': {error}") from error


def _values(model: ModelConfig) -> dict[str, Any] | None:
    """What the model's sizes are read from; None where it can't be (its step says why)."""
    if model.source is None:
        return model.settings
    if model.path is None:
        return None
    try:
        values = json.loads((Path(model.path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _bare(model: ModelConfig, values: dict[str, Any]) -> PreTrainedModel | None:
    """The model on "meta"; None for a folder whose model is none of the family's."""
    from goldcrest.kernels.language.architectures import bare_model, fresh_config, parse_config

    try:
        if model.path is not None:
            return bare_model(parse_config(values), model.family)
        special = {"pad": 0, "eos": 1}  # what the tokenizer will decide changes no block
        config = fresh_config(model.architecture, values, vocabulary=16, special=special)
        return bare_model(config, model.family)
    except ValueError:
        return None

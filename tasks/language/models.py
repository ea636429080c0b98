"""Which model a step starts from: a fresh one of some architecture, or one that is there already.

    model: {architecture: llama, settings: {hidden_size: 64, num_hidden_layers: 2}}
    model: {path: /models/t5-small, family: seq2seq}              # a folder
    model: {hub: google-t5/t5-small, family: seq2seq}             # the Hugging Face hub

A fresh model takes its vocabulary and special ids from the tokenizer. A model that is loaded is
data: no code from its folder runs, and weights are read from safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from goldcrest.cluster.api import Config, InputError, InputFiles
from goldcrest.tasks.methods import remembered

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

Family = Literal["causal", "seq2seq", "masked", "speech"]
_ARCHITECTURES = "goldcrest.kernels.language.architectures"


class ModelConfig(Config):
    """A fresh model (`architecture`, `settings`) or a trained one (`path` or `hub`)."""

    family: Family = Field(
        "causal",
        description="causal: continues text; seq2seq: input to output; masked: fills gaps; "
        "speech: audio to text",
    )
    architecture: str = Field(
        "llama", description="of a fresh model: a model type of the transformers library"
    )
    settings: dict[str, Any] = Field(
        {}, description="of a fresh model: sizes and others, as its configuration class has them"
    )
    path: Annotated[str | None, InputFiles] = Field(
        None, description="a trained model: a folder with config.json and *.safetensors"
    )
    hub: str | None = Field(
        None, description="a trained model: its name on the Hugging Face hub, OWNER/NAME"
    )
    revision: str | None = Field(
        None, description="commit or tag on the hub; give a commit, names move"
    )

    @property
    def source(self) -> str | None:
        """Where a trained model comes from; None for a fresh one."""
        return self.path if self.path is not None else self.hub

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.path is not None and self.hub is not None:
            raise ValueError("give path or hub, not both")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision: only names on the hub have revisions")
        if self.source is not None:
            if self.settings:
                raise ValueError(f"settings are for fresh models; this one is {self.source}")
            return self

        def ask() -> dict[str, Any]:
            from goldcrest.kernels.language.architectures import complete_settings

            return complete_settings(self.architecture, self.family, self.settings)

        question = [self.architecture, self.family, self.settings, version("transformers")]
        object.__setattr__(self, "settings", remembered(question, [_ARCHITECTURES], ask))
        return self


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Ids of the tokenizer's pad, bos and eos tokens, None for those it has not."""
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def model_config(model: ModelConfig, tokenizer: Any) -> PreTrainedConfig:
    """The configuration of the model that a step starts from; InputError if it can't be read."""
    from goldcrest.kernels.language.architectures import fresh_config

    if model.source is None:
        return fresh_config(
            model.architecture,
            model.settings,
            vocabulary=len(tokenizer),
            special=special_ids(tokenizer),
        )
    from transformers import AutoConfig

    config: PreTrainedConfig = _loaded(model, AutoConfig.from_pretrained)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        # Some folders name it for generation only; what is trained has to start with it too.
        said = load_generation(model)
        config.decoder_start_token_id = getattr(said, "decoder_start_token_id", None)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.source} "
            f"{config.get_text_config().vocab_size}",
            hint="load the tokenizer that belongs to the model",
        )
    return config


def build_model(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a step starts from, in float32, weights drawn or loaded."""
    from goldcrest.kernels.language.architectures import new_model

    if model.source is None:
        return new_model(config, model.family)
    loaded = load_pretrained(model)
    if config.is_encoder_decoder:  # which the folder's config.json may leave to others
        loaded.config.decoder_start_token_id = config.decoder_start_token_id
    return loaded


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switch on activation checkpointing; InputError for an architecture without it."""
    try:
        model.activation_checkpointing_enable()
    except ValueError as error:
        raise InputError(
            f"{type(model).__name__} has no activation checkpointing",
            hint="set activation_checkpointing to false",
        ) from error


def load_pretrained(model: ModelConfig) -> PreTrainedModel:
    """The trained model that is named, in float32: safetensors only, no code of its own.

    Raises InputError where a weight is missing: the library would draw it at random.
    """
    import torch

    from goldcrest.kernels.language.architectures import auto_class

    if model.path is not None and (Path(model.path) / "bundle.json").is_file():
        return _from_bundle(Path(model.path), model.family)

    def load(name: str, **options: Any) -> Any:
        return auto_class(model.family).from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )

    loaded, info = _loaded(model, load)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the model {model.source} lacks {len(missing)} weights of family '{model.family}', "
            f"first {missing[0]}",
            hint=f"it was made for another purpose: the families are {', '.join(get_args(Family))}",
        )
    return loaded


def _from_bundle(folder: Path, family: str) -> PreTrainedModel:
    """The model of a language bundle, whose weights may be packed as only bundles are."""
    from goldcrest.tasks.language.bundle import load_model, read_description

    description = read_description(folder)
    if description.get("quantization") is not None:
        raise InputError(
            f"the bundle {folder} is quantized, which can't be trained or pruned further",
            hint="start from the float bundle that it was made of",
        )
    if description["family"] != family:
        raise InputError(
            f"the bundle {folder} is of family '{description['family']}', not '{family}'",
            hint=f"set pretrain.model.family to {description['family']}",
        )
    return load_model(folder).float().requires_grad_(True)


def load_generation(model: ModelConfig) -> GenerationConfig | None:
    """What a trained model says of generation; None where it says nothing, and for a fresh one."""
    from transformers import GenerationConfig

    if model.source is None:
        return None
    try:
        return _loaded(model, GenerationConfig.from_pretrained)
    except InputError:
        return None  # a model without generation_config.json


def _loaded(model: ModelConfig, load: Callable[..., Any]) -> Any:
    """What the library's `load` makes of the named model, errors told as InputError."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if model.path is None:
        options["revision"] = model.revision or "main"
    elif not (Path(model.path) / "config.json").is_file():
        raise InputError(f"{model.path} is not a folder with a model: it has no config.json")
    else:
        options["local_files_only"] = True
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load(model.source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the model {model.source} can't be loaded as family '{model.family}': {reason}",
            hint="it must be a model of the transformers library with safetensors weights",
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()

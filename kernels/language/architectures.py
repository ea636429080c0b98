"""Transformers of every architecture that Hugging Face's library has, by family.

A family is what a model does with text: "causal" continues it, "seq2seq" answers an input with an
output, "masked" fills in what was hidden, "speech" writes down what was said. An architecture is
the library's `model_type`: "llama", "gpt2", "mpt", "t5", "bert", "whisper"...; its settings are
the fields of its configuration class, apart from those that a tokenizer decides.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

_AUTO_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked": AutoModelForMaskedLM,
    "speech": AutoModelForSpeechSeq2Seq,
}
_WELL_KNOWN = ("llama", "gpt2", "mpt", "opt", "qwen2", "t5", "mt5", "bart", "bert", "whisper")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
MISFITS = (
    *(TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError, KeyError),
    *(AttributeError, IndexError),
)
"""What the library raises where sizes don't fit."""
_LOADED = "_is_hf_initialized"  # the library's mark on what must not be drawn again
_FROM_TOKENIZER = {
    *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
}


def auto_class(family: str) -> Any:
    """The library's auto class of a family; ValueError for a family there is not."""
    if family not in _AUTO_CLASSES:
        raise ValueError(f"there is no family '{family}'; there are {', '.join(_AUTO_CLASSES)}")
    return _AUTO_CLASSES[family]


def model_class(config: PreTrainedConfig, family: str) -> type[PreTrainedModel]:
    """The class of the family's model; ValueError for a configuration of another family."""
    known = auto_class(family)._model_mapping
    if type(config) not in known:
        raise ValueError(f"'{config.model_type}' has no model of the family '{family}'")
    found = known[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def architecture_names(family: str) -> list[str]:
    """Architectures that have a model of the family."""
    known = auto_class(family)._model_mapping._model_mapping
    return sorted(name for name in known if name in CONFIG_MAPPING)


def check_architecture(architecture: str, family: str) -> None:
    """ValueError, naming what there is, for an architecture without a model of the family."""
    known = architecture_names(family)
    if architecture in known:
        return
    near = difflib.get_close_matches(architecture, known, 1)
    guess = f"; did you mean '{near[0]}'?" if near else "."
    some = ", ".join(name for name in _WELL_KNOWN if name in known)
    others = [
        each
        for each in _AUTO_CLASSES
        if each != family and architecture in architecture_names(each)
    ]
    if others:
        guess = f"; it is {' or '.join(others)}."
    raise ValueError(
        f"there is no architecture '{architecture}' in the family '{family}'{guess} "
        f"There are {len(known)}, among them {some}"
    )


def complete_settings(architecture: str, family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of an architecture, defaults filled in, as plain JSON values.

    A model of these sizes is laid out without memory, so sizes that don't fit are found here.
    Raises ValueError for an unknown architecture or setting, a wrong value, or one that is the
    tokenizer's to decide.
    """
    check_architecture(architecture, family)
    allowed = _setting_names(architecture)
    for name in given:
        if name in _FROM_TOKENIZER:
            raise ValueError(f"'{name}' comes from the tokenizer: leave it out")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            guess = f"; did you mean '{near[0]}'?" if near else "."
            raise ValueError(
                f"{architecture} has no setting '{name}'{guess} Allowed: {', '.join(allowed)}"
            )
    config = fresh_config(architecture, given, vocabulary=16, special={"pad": 0, "eos": 1})
    bare_model(config, family)
    values = config.to_dict()
    return {name: values[name] for name in allowed if name in values}


def _setting_names(architecture: str) -> list[str]:
    """Fields of the architecture's own configuration class that a user may set."""
    common = {each.name for each in dataclasses.fields(PreTrainedConfig)}
    own = [each.name for each in dataclasses.fields(CONFIG_MAPPING[architecture])]
    return [name for name in own if name not in common | _FROM_TOKENIZER]


def fresh_config(
    architecture: str,
    settings: Mapping[str, Any],
    *,
    vocabulary: int,
    special: Mapping[str, int | None],
) -> PreTrainedConfig:
    """The configuration of a new model for a vocabulary of that many tokens.

    `special` gives the ids of "pad", "bos", "eos" (None or absent: there is no such token).
    A decoder starts with "bos", or with "pad" where there is none, as T5 does.
    Raises ValueError for settings that the architecture refuses.
    """
    ids: dict[str, Any] = {f"{n}_token_id": special.get(n) for n in ("pad", "bos", "eos")}
    kind = CONFIG_MAPPING[architecture]
    own = {each.name for each in dataclasses.fields(kind)}
    ids |= {name: [] for name in ("suppress_tokens", "begin_suppress_tokens") if name in own}
    start = special.get("bos") if special.get("bos") is not None else special.get("pad")
    if "decoder_start_token_id" in own:
        ids["decoder_start_token_id"] = start
    try:
        config = kind(**{**settings, **ids, "vocab_size": vocabulary})
    except Exception as error:
        # The library's checks raise classes of their own, of several packages.
        raise ValueError(f"{architecture}: {_one_line(error)}") from error
    if config.is_encoder_decoder:
        config.decoder_start_token_id = start
    return config


def bare_model(config: PreTrainedConfig, family: str) -> PreTrainedModel:
    """A model without memory for its weights (device "meta").

    Raises ValueError for sizes that don't fit and for a configuration of another family.
    """
    model_class(config, family)
    try:
        with torch.device("meta"):
            return auto_class(family).from_config(config, trust_remote_code=False)
    except MISFITS as error:
        raise ValueError(f"{config.model_type} of these sizes: {_one_line(error)}") from error


def new_model(config: PreTrainedConfig, family: str) -> PreTrainedModel:
    """A model with freshly drawn weights, from torch's global generator, in float32."""
    return auto_class(family).from_config(config, trust_remote_code=False, dtype=torch.float32)


def parse_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration object of a config.json; ValueError if it is none.

    Code that a file names (`auto_map`) is not looked at: only the library's own classes are.
    """
    architecture = values.get("model_type")
    if not isinstance(architecture, str) or architecture not in CONFIG_MAPPING:
        raise ValueError(f"the model type {architecture!r} is not one of the transformers library")
    try:
        return CONFIG_MAPPING[architecture].from_dict(dict(values))
    except Exception as error:
        raise ValueError(f"config of {architecture}: {_one_line(error)}") from error


def generation_config(config: PreTrainedConfig) -> GenerationConfig:
    """What `generate` needs to know of a model: the ids of its special tokens."""
    return GenerationConfig.from_model_config(config)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that the model has positions for; None if its positions are relative.

    Only fields of the architecture count: T5's files name `n_positions`, which T5 never reads.
    """
    fields = {each.name for each in dataclasses.fields(type(config))}
    fields |= set(type(config).attribute_map)
    for name in _POSITIONS:
        value = getattr(config, name, None) if name in fields else None
        if isinstance(value, int):
            return value - first_position(config)
    return None


def first_position(config: PreTrainedConfig) -> int:
    """The position of a text's first token: 0, but RoBERTa and its kin count on from padding.

    There the row of the padding token's id stands for padding in the table of positions, and those
    before it for nothing (transformers, `create_position_ids_from_input_ids`).
    """
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except (*MISFITS, ImportError):  # what can't be laid out is told of elsewhere
        return 0
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def decoder_start(config: PreTrainedConfig) -> int:
    """Id of the token that an encoder-decoder starts with; bos where none is named, as the library
    has it. ValueError where there is neither.
    """
    text = config.get_text_config(decoder=True)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for each in (config, text):
            if isinstance(value := getattr(each, name, None), int):
                return value
    raise ValueError(f"the config of '{config.model_type}' names no decoder_start_token_id")


def speech_window(config: PreTrainedConfig) -> tuple[int, int]:
    """Frames of 10 ms that a speech model always reads, and their mel bins.

    The encoder of Whisper halves the frames by a stride of two before it gives them positions.
    Raises ValueError for an architecture that reads anything else.
    """
    positions = getattr(config, "max_source_positions", None)
    bins = getattr(config, "num_mel_bins", None)
    if not isinstance(positions, int) or not isinstance(bins, int):
        raise ValueError(f"'{config.model_type}' does not read Whisper's log-mel features")
    return 2 * positions, bins


def library_frozen(config: PreTrainedConfig, family: str) -> list[str]:
    """Names of the parameters that the library keeps as they are: tables of sines, say."""
    model = bare_model(config, family)
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def settle(model: PreTrainedModel) -> None:
    """Give a model whose weights were loaded onto "meta" its tied weights and computed buffers.

    Low-precision modules that stand in it must not have buffers outside of the state.
    Raises ValueError naming weights that are still missing.
    """
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    persistent = dict(model.named_buffers()).keys() & model.state_dict().keys()
    missing += [name for name in sorted(persistent) if model.get_buffer(name).is_meta]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"the weights {', '.join(missing[:3])}{more} are missing")
    for value in (*model.parameters(), *model.buffers()):
        setattr(value, _LOADED, True)  # so that what follows keeps it
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # rotary frequencies and the like: computed, never stored
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(
                leaf, torch.empty_like(buffer, device="cpu"), persistent=False
            )
    for module in model.modules():
        setattr(module, _LOADED, False)
    model.initialize_weights()


def own_state(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A state of the model (its own, if none is given) without second names of tied weights."""
    tied = model.all_tied_weights_keys
    named = model.state_dict() if state is None else state
    return {name: value for name, value in named.items() if name not in tied}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

"""Language bundles: a folder that is enough to serve, evaluate and compress a model further.

bundle.json             schema, kind, name, family, sizes, how it was made
config.json             the architecture, as the transformers library reads it
generation_config.json  special ids for generation
model.safetensors       weights: float32, bitmask-packed where sparse, codes where quantized
tokenizer/              the tokenizer's files
MODEL_CARD.md           for people

A dense bundle is a model folder of the transformers library: `from_pretrained(folder)` loads it.
A quantized one says in `quantization` which low-precision modules its weights belong to; they are
put in place before anything is loaded, so no float copy of the weights is ever made.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import Artifact, InputError, Output
from goldcrest.tasks import bundles
from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

SCHEMA = 1
KIND = "language"
LICENCE = "the model inherits the terms of the text and of the model that it was trained from"
_SERVED = ("bundle.json", "config.json", "generation_config.json", "model.safetensors")
_INSTALLERS = {
    "int8": "goldcrest.kernels.quantization.int8_transformer",
    "weight_only": "goldcrest.kernels.weight_only.transformer",
}
_CPU_FORMS = ("int8",)
"""Forms whose products are operators of the CPU (FBGEMM, oneDNN)."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded bundle: its description, the model in eval mode, its tokenizer."""

    facts: Mapping[str, Any]
    model: PreTrainedModel
    tokenizer: Any


def write_bundle(
    out: Output,
    *,
    name: str,
    family: str,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Path,
    facts: Mapping[str, Any],
    packed: Sequence[str] | None = None,
    generation: GenerationConfig | None = None,
) -> None:
    """Write a bundle into the step's artifact.

    Args:
        name: "dense", "sparse_75", "int8", "int4".
        family: of models.py.
        config: the model's configuration.
        tensors: the model's state; second names of tied weights may be left out.
        tokenizer: the folder with the tokenizer's files (`tokenizer_folder(artifact)`).
        facts: what else to say; they win over what is worked out here.
        packed: names of tensors to store with bitmasks.
        generation: what the model that it was made from knows of generation; None: the special
            ids of `config`.
    """
    from goldcrest.kernels.language.architectures import generation_config, model_class
    from goldcrest.kernels.sparsity.packing import pack_state

    values = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}  # no paths
    generation = generation or generation_config(config)
    out.tensors("model", pack_state(dict(tensors), list(packed)) if packed else tensors)
    values["architectures"] = [model_class(config, family).__name__]
    values["dtype"] = str(_precision(tensors)).removeprefix("torch.")
    out.json("config", values)
    out.text("generation_config.json", generation.to_json_string(use_diff=True))
    for member in sorted(each for each in tokenizer.iterdir() if each.is_file()):
        shutil.copyfile(member, out.file(f"tokenizer/{member.name}"))
    description = {
        "schema": SCHEMA,
        "kind": KIND,
        "name": name,
        "family": family,
        "architecture": config.model_type,
        "packed": list(packed or ()),
        "parameters": sum(value.numel() for value in _weights(tensors)),
        "sparsity": zero_share(tensors),
        "bits": 8 * _precision(tensors).itemsize,
        "licence": LICENCE,
        **facts,
    }
    out.json("bundle", description)
    out.text("MODEL_CARD.md", model_card(description))


def verified(bundle: Artifact) -> Path:
    """The folder of a bundle's artifact, every file that loading reads verified."""
    for member in _SERVED:
        bundle.file(member)
    tokenizer_folder(bundle)
    return bundle.path


def _weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for value in tensors.values() if value.is_floating_point()]


def _precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of most of the weights that are not integers."""
    return max(_weights(tensors), key=lambda value: value.numel()).dtype


def zero_share(tensors: Mapping[str, Tensor]) -> float:
    """Share of zeros among the weights with two dimensions or more, in [0, 1]."""
    matrices = [value for value in _weights(tensors) if value.ndim >= 2]
    total = sum(value.numel() for value in matrices)
    zeros = sum(int((value == 0).sum()) for value in matrices)
    return round(zeros / total, 6) if total else 0.0


def bundle_bytes(folder: Path) -> int:
    """Bytes of what serving needs: weights, descriptions, tokenizer."""
    served = [folder / name for name in _SERVED]
    served += [each for each in (folder / "tokenizer").iterdir() if each.is_file()]
    return sum(each.stat().st_size for each in served)


def read_description(folder: Path | str) -> dict[str, Any]:
    """The checked bundle.json of a folder; InputError names what is wrong."""
    return bundles.read_description(Path(folder), kind=KIND, schema=SCHEMA)


def float_text_bundle(bundle: Artifact) -> tuple[Path, dict[str, Any]]:
    """Folder and description of what a quantizer takes; InputError for codes in place of floats."""
    folder = verified(bundle)
    description = read_description(folder)
    if description.get("quantization") is not None:
        raise InputError(f"the bundle '{description['name']}' is quantized already")
    return folder, description


def load_config(folder: Path | str) -> PreTrainedConfig:
    """The model configuration of a bundle; no code that it may name is looked at."""
    from goldcrest.kernels.language.architectures import parse_config

    with bundles.told_as_input(Path(folder)):
        return parse_config(bundles.read_json(Path(folder) / "config.json"))


def load_model(folder: Path | str) -> PreTrainedModel:
    """The model of any language bundle, in eval mode; InputError when it is not one."""
    from goldcrest.kernels.language.architectures import settle

    folder = Path(folder)
    facts = read_description(folder)
    model = load_bare(folder)
    with bundles.told_as_input(folder):
        if facts.get("quantization") is not None:
            _quantized(facts["quantization"]).install(model, facts["quantization"])
        state = bundles.load_state(folder)
        own = model.state_dict()
        bundles.check_state(state, ((name, own[name]) for name in own if name in state))
        model.load_state_dict(state, strict=False, assign=True)
        settle(model)  # which names what is missing: tied weights are stored once
        if facts.get("quantization") is not None:
            _quantized(facts["quantization"]).check(model)
    return model.eval().requires_grad_(False)


def load_bare(folder: Path | str) -> PreTrainedModel:
    """The float model of a bundle without its weights (device "meta").

    Sizes are the file's claim: nothing is allocated for them.
    """
    from goldcrest.kernels.language.architectures import bare_model

    folder = Path(folder)
    with bundles.told_as_input(folder):
        model = bare_model(load_config(folder), read_description(folder)["family"])
        if model.can_generate():
            model.generation_config = _load_generation(folder)
    return model


def _load_generation(folder: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(bundles.read_json(folder / "generation_config.json"))


def _quantized(quantization: Mapping[str, Any]) -> Any:
    """What puts the low-precision modules that the weights belong to in place, and checks them."""
    form = quantization.get("form")
    if form not in _INSTALLERS:
        raise ValueError(f"its quantization form {form!r} is none of {', '.join(_INSTALLERS)}")
    return importlib.import_module(_INSTALLERS[form])


def load_bundle(folder: Path | str) -> LanguageModel:
    """Any language bundle, ready to use; InputError when it is not one."""
    folder = Path(folder)
    facts = read_description(folder)
    return LanguageModel(facts, load_model(folder), load_tokenizer(folder / "tokenizer"))


def device_for(facts: Mapping[str, Any], device: str) -> str:
    """Where a bundle computes that may use `device`: an INT8 one stays on the CPU."""
    form = (facts.get("quantization") or {}).get("form")
    return "cpu" if form in _CPU_FORMS else device


_AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "speech": "AutoModelForSpeechSeq2Seq",
}


def model_card(facts: Mapping[str, Any]) -> str:
    """MODEL_CARD.md of a bundle."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _card_rows(facts))
    plain = not facts["packed"] and facts.get("quantization") is None
    other = ""
    if plain:
        other = (
            f"\nIt is also a model folder of the transformers library: `{_AUTO[facts['family']]}"
        )
        other += ".from_pretrained(folder)`.\n"
    return f"""# {facts["name"]} language model

A {facts["architecture"]} model of the family "{facts["family"]}".

| what | value |
|---|---|
{rows}

Load it with `goldcrest.tasks.language.bundle.load_bundle(folder)`; the result has `model` and
`tokenizer`.{other}
Lineage and the exact configuration are in the manifest beside this card and in the run's report.

Intended use: the task of the text that it was trained on. It repeats the errors and biases of that
text, and states falsehoods fluently; measure it on your own examples before you rely on it.

Licence: {facts["licence"]}.
"""


def _card_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "parameters", f"{facts['parameters']:,}"
    yield "zeros among the weight matrices", f"{facts['sparsity']:.1%}"
    yield "bits of a weight", facts["bits"]
    yield from facts.get("training", {}).items()
    if facts.get("quantization"):
        yield "quantization", facts["quantization"]["form"]
    if facts.get("base_sha256"):
        yield "made from weights with SHA-256", facts["base_sha256"]
    yield from _measured_rows(facts.get("measured", {}))


def _measured_rows(measured: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What an evaluation found (added by publish.py): values with their intervals, and the size."""
    for name, value in measured.items():
        if f"{name}_ci" in measured:
            low, high = measured[f"{name}_ci"]
            yield name, f"{value:.4g} (95 % interval {low:.4g} to {high:.4g})"
    if "bytes" in measured:
        yield "bytes to serve it", f"{measured['bytes']:,}"

"""INT8: weights, activations, attention and cache of a language model in eight bits and less.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3.4 (spec "sparse fine-tuning", section 3.4): smoothing, operations whose
inputs have the highest kurtosis left in floating point, activation ranges from training rows, GPTQ
for the weights, zeros kept.

Artifact: the bundle `int8`, weights with many zeros stored with bitmasks; `operations`, a table of
every operation with the score that decides what is skipped, and its figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.language.bundle import (
    float_text_bundle,
    load_config,
    load_model,
    write_bundle,
)
from goldcrest.tasks.language.ranking_figure import ranked, ranking_figure
from goldcrest.tasks.language.recipe import check_lengths
from goldcrest.tasks.language.rows import check_speech, open_rows, rows_file
from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder
from goldcrest.tasks.methods import SettingsOf, settings_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


_KERNEL = "goldcrest.kernels.quantization.int8_transformer"
PACKING_PAYS = 0.2  # share of zeros above which a bitmask (1/8 byte a weight) saves bytes


class QuantizeInt8Config(Config):
    """Calibration rows and the settings of the quantizer."""

    calibration: int = Field(128, ge=1, description="rows that set ranges and Hessians")
    calibration_length: int = Field(2048, ge=2, description="tokens of a calibration row at most")
    rows_per_batch: int = Field(8, ge=1, description="calibration rows in a forward pass")
    settings: Annotated[dict[str, Any], SettingsOf(_KERNEL, "Settings")] = Field(
        {}, description="GPTQ or rounding, smoothing, ranges, attention, head, what to skip"
    )


@task(cpus=1, timeout="2d", version=6)
def quantize_int8(cfg: QuantizeInt8Config, model: Artifact, tokens: Artifact, out: Output) -> None:
    """Quantize a float bundle (dense or sparse), calibrated on `tokens`, to the bundle `int8`.

    All of it runs on the CPU, on the cores that the step holds, also where a profile gives it a
    GPU: every block is calibrated on what the integer layers before it give, and their operators
    are the CPU's. A large model takes days; `quantize_int4` can use a GPU.
    """
    from goldcrest.kernels.quantization.int8_transformer import quantize, state

    folder, before = float_text_bundle(model)
    config = load_config(folder)
    network = load_model(folder).float()
    given = _batches(cfg, before["family"], network, model, tokens, out.seed)
    out.progress(0.1, f"{len(given)} calibration batches")
    told = {"loss": {"float": _loss(network, given)}}
    try:
        description = quantize(network, given, settings_of(_KERNEL, "Settings", cfg.settings))
    except ValueError as error:
        raise _refused(error) from error
    told["loss"]["int8"] = _loss(network, given)
    tensors = state(network, description)
    _report(description, told, out)
    write_bundle(
        out,
        name="int8",
        family=before["family"],
        config=config,
        tensors=tensors,
        tokenizer=tokenizer_folder(model),
        generation=getattr(network, "generation_config", None),  # models that only read have none
        packed=[name for name, each in tensors.items() if _packing_pays(each)],
        facts={
            "bits": 8,
            "parameters": before["parameters"],
            "sparsity": before["sparsity"],
            "quantization": description,
            "base_sha256": model.manifest["files"]["model.safetensors"]["sha256"],
            "training": {
                "weights": f"int8, {cfg.settings['weights']}",
                "activations": f"7 bits, {cfg.settings['activations']}",
                "calibration rows": sum(len(batch["labels"]) for batch in given),
                "operations left in float32": len(description["skipped"]),
            },
        },
    )


def check_quantizable(cfg: QuantizeInt8Config, model: PreTrainedModel, family: str) -> None:
    """StepError for a model on "meta", which is changed, that can't be quantized so."""
    from goldcrest.kernels.quantization import int8_transformer

    settings = settings_of(_KERNEL, "Settings", cfg.settings)
    try:
        int8_transformer.check_quantizable(model, _least_batch(model.config, family), settings)
    except ValueError as error:
        raise _refused(error) from error


def _least_batch(config: PreTrainedConfig, family: str) -> dict[str, Tensor]:
    """Inputs without values ("meta") for a model of the family."""
    import torch

    from goldcrest.kernels.language.architectures import speech_window

    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    if family != "speech":
        return {"input_ids": ids, **({"decoder_input_ids": ids} if family == "seq2seq" else {})}
    frames, bins = speech_window(config)
    speech = torch.zeros(1, bins, frames, device="meta")
    return {"input_features": speech, "decoder_input_ids": ids}


def _refused(error: ValueError) -> StepError:
    return StepError(f"the model can't be quantized to INT8: {error}")


def _batches(
    cfg: QuantizeInt8Config,
    family: str,
    network: PreTrainedModel,
    model: Artifact,
    tokens: Artifact,
    seed: int,
) -> list[dict[str, Tensor]]:
    """A seeded sample of the training rows, cut to length, rows of alike lengths together.

    Rows that have no loss any more once they are cut are left out: a batch of them has a loss of
    NaN, and with it every score that is measured by the loss.
    """
    from goldcrest.tasks.data.tokens import cut, has_loss
    from goldcrest.tasks.language.collator import make_collator
    from goldcrest.tasks.language.documents import check_reading

    reader, config = open_rows(rows_file(tokens, "train"), family), network.config
    check_speech(reader, config)
    check_lengths(reader, family, config, cfg.calibration_length)
    if not len(reader):
        raise StepError("the tokens have no training rows, which are needed to calibrate on")
    collate = make_collator(family, load_tokenizer(tokenizer_folder(model)), config)
    check_reading(network, collate, reader, cut=cfg.calibration_length)
    rng = np.random.default_rng([seed, 8])
    usable = (
        (int(reader.lengths[number]), row)
        for number in rng.permutation(len(reader))
        if has_loss(
            row := cut(reader[int(number)], cfg.calibration_length, family),
            family,
            collate.special,
        )
    )
    chosen = sorted(itertools.islice(usable, cfg.calibration), key=lambda pair: pair[0])
    rows = [row for _, row in chosen]
    if not rows:
        raise StepError(
            f"cut to {cfg.calibration_length} tokens no row has an answer left, which the loss "
            "before and after quantization is about",
            hint="raise calibration_length, or calibrate on rows with shorter prompts",
        )

    size = cfg.rows_per_batch
    return [collate(rows[start : start + size], rng) for start in range(0, len(rows), size)]


def _loss(network: Any, given: list[dict[str, Tensor]]) -> float:
    from goldcrest.kernels.quantization.int8_sensitivity import mean_loss

    return mean_loss(network, given)


def _packing_pays(tensor: Tensor) -> bool:
    import torch

    zeros = float((tensor == 0).float().mean()) if tensor.numel() else 0.0
    return tensor.dtype == torch.int8 and tensor.ndim == 2 and zeros > PACKING_PAYS


def _report(description: Mapping[str, Any], told: Mapping[str, Any], out: Output) -> None:
    """Metrics, the table of operations by score, and its figure."""
    scores: dict[str, float] = description["scores"]
    names = ranked(scores)
    criterion, skipped = description["settings"]["criterion"], set(description["skipped"])
    out.table(
        "operations",
        {
            "operation": names,
            criterion: [scores[name] for name in names],
            "skipped": [name in skipped for name in names],
        },
    )
    figure = ranking_figure(
        scores,
        title="What INT8 harms most (red: left in float32)",
        label=f"{criterion} of the operation's inputs",
        marked=skipped,
    )
    out.figure("operations", figure)
    out.metrics(
        int8={
            "calibration_loss": told["loss"],
            "skipped": sorted(skipped),
            "linears": len(description["linears"]),
            "attentions": len(description["attentions"]),
            "smoothed_groups": len(description["smoothed"]),
            "worst": {"operation": names[0], "score": scores[names[0]]},
        }
    )

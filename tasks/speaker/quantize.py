"""Quantize: the sparse (or dense) network to INT8 weights and activations, executed on integers.

Source: Kurtic et al. 2023 (spec "sparse fine-tuning", section 3.4): smoothing, operations of the
highest kurtosis skipped, activation ranges from calibration features, GPTQ for the weights, zeros
kept. No label is seen.

Artifact: the bundle `int8`; weights with many zeros are stored with bitmasks.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.methods import SettingsOf, settings_of
from goldcrest.tasks.speaker.bundle import load_network, read_description, write_bundle

_QUANTIZE = "goldcrest.kernels.quantization.quantize_ecapa"
PACKING_PAYS = 0.2  # share of zeros above which a bitmask (1/8 byte a weight) saves bytes


class QuantizeConfig(Config):
    """Calibration and the settings of the quantizer."""

    calibration: int = Field(128, ge=1, description="training utterances that set the ranges")
    settings: Annotated[dict[str, Any], SettingsOf(_QUANTIZE, "Settings")] = Field(
        {}, description="GPTQ or rounding, smoothing, ranges, operations to skip"
    )


@task(cpus=1, timeout="12h")
def quantize(cfg: QuantizeConfig, model: Artifact, features: Artifact, out: Output) -> None:
    """Quantize a float bundle's network and write the bundle `int8`."""
    import torch

    from goldcrest.kernels.quantization.quantize_ecapa import quantize_ecapa

    for member in ("bundle.json", "model.safetensors"):
        model.file(member)
    description = read_description(model.path)
    network = load_network(model.path)
    reader = FrameReader(features.file("fbank.arrow"))
    rows = calibration_rows(features, reader, cfg.calibration, out.seed)
    batches = [(torch.from_numpy(reader[int(row)]).mT[None].contiguous(), None) for row in rows]
    quantized = quantize_ecapa(network, batches, settings_of(_QUANTIZE, "Settings", cfg.settings))
    tensors = quantized.tensors()
    out.metrics(int8={"embedding_cosine": _agreement(network, quantized, batches)})
    write_bundle(
        out,
        name="int8",
        tensors=tensors,
        network=description["network"],
        front_end=description["front_end"],
        packed=[
            name
            for name, value in tensors.items()
            if value.dtype == torch.int8 and float((value == 0).float().mean()) > PACKING_PAYS
        ],
        facts={
            "parameters": description["parameters"],
            "int8": quantized.config(),
            "base_sha256": model.manifest["files"]["model.safetensors"]["sha256"],
            "training": {
                "weights": f"int8, {cfg.settings['weights']}",
                "activations": "uint8, calibrated",
                "calibration utterances": len(rows),
            },
        },
    )


def calibration_rows(features: Artifact, reader: FrameReader, count: int, seed: int) -> np.ndarray:
    """A seeded sample of the clean training utterances' rows."""
    splits = np.array(features.table("index", ["split"])["split"].to_pylist())
    train = np.flatnonzero((splits == "train") & (reader.copies == 0))
    if len(train) == 0:
        raise StepError("there is no training utterance to calibrate on")
    return np.random.default_rng([seed, 8]).permutation(train)[:count]


def _agreement(network: Any, quantized: Any, batches: list[Any]) -> float:
    """Mean cosine between float and integer embeddings of the calibration utterances."""
    import torch

    with torch.inference_mode():
        pairs = [
            torch.cosine_similarity(network(features), quantized(features)).mean()
            for features, _ in batches
        ]
    return float(torch.stack(pairs).mean())

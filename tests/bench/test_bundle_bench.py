"""Latency of bundles of real.yaml's size, from a waveform of 3 s to its embedding, on one thread.

    python -m pytest tests/bench/test_bundle_bench.py -s

The weights are random, three quarters of them zero in the sparse and the INT8 bundle: time does not
depend on what they say. The three are timed in turns, so that they share the machine's moods.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from goldcrest.cluster.artifact import Output
from goldcrest.cluster.runtime import LocalRuntime
from goldcrest.kernels.quantization.quantize_ecapa import Settings, quantize_ecapa
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn
from goldcrest.tasks.speaker.bundle import write_bundle
from goldcrest.tasks.speaker.evaluate import time_bundles
from goldcrest.tasks.speaker.frontend import FrontEndConfig
from goldcrest.tasks.speaker.network import network_settings

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "speaker" / "real.yaml"
UTTERANCES, SECONDS = 60, 3.0


def bundles(folder: Path) -> dict[str, Path]:
    """A dense, a sparse and an INT8 bundle with the sizes of real.yaml."""
    torch.manual_seed(0)
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    sizes = {**config["pretrain"]["network"], "input_dim": 40}
    known = set(FrontEndConfig.model_fields)
    front = {name: value for name, value in config["features"].items() if name in known}
    network = EcapaTdnn(network_settings(sizes)).eval()
    pruned = EcapaTdnn(network_settings(sizes)).eval()
    for parameter in pruned.parameters():
        if parameter.ndim > 1:
            parameter.data *= torch.rand_like(parameter) < 0.25
    int8 = quantize_ecapa(pruned, [(torch.randn(4, 40, 200), None)], Settings(weights="rtn"))
    made = {}
    for name, tensors, more in (
        ("dense", network.state_dict(), {}),
        ("sparse", pruned.state_dict(), {}),
        ("int8", int8.tensors(), {"int8": int8.config()}),
    ):
        made[name] = folder / name
        made[name].mkdir()
        out = Output(made[name], runtime=LocalRuntime(), seed=0, scratch=folder / "scratch")
        write_bundle(
            out,
            name=name,  # type: ignore[arg-type]
            tensors=tensors,
            network=sizes,
            front_end=FrontEndConfig(**front).model_dump(),
            facts=more,
        )
    return made


def test_int8_is_not_slower_than_dense(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = int(16_000 * SECONDS)
    noise = functools.partial(rng.normal, 0.0, 0.05, samples)
    waveforms = [noise().astype(np.float32) for _ in range(UTTERANCES)]
    times = time_bundles(bundles(tmp_path), waveforms=waveforms)
    for name, found in times.items():
        print(f"\n{name}: {found['latency_ms_p50']:.1f} ms, rtf {found['rtf']:.4f}", end="")
    assert times["int8"]["latency_ms_p50"] <= times["dense"]["latency_ms_p50"]

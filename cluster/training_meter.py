"""What training costs: throughput, hours, an energy estimate, peak memory.

    throughput   = units / seconds inside the loop (start of processes and imports not counted)
    CPU-hours    = seconds * workers * cpus_per_worker / 3600; GPU-hours likewise
    energy (kWh) = CPU-hours * 10 W / 1000 + GPU-hours * 400 W / 1000
    peak memory  = largest resident set of any worker since its process began; on a GPU also the
                   largest allocation of torch

The energy is an estimate from reserved hardware, not a measurement: 10 W is about the share of one
core in a loaded server with its memory and fans, 400 W a loaded data-centre GPU. Units that an
objective can declare in its batches: `seconds` (seconds of audio per example) and `tokens` (tokens
per example, or a matrix of token ids, of which all count).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

from goldcrest.cluster.training_config import TrainingConfig

CPU_CORE_WATTS = 10.0
GPU_WATTS = 400.0
UNITS = {"seconds": "audio_seconds", "tokens": "tokens"}


def units_in(batch: Mapping[str, torch.Tensor]) -> list[float]:
    """Seconds of audio and tokens in one batch, 0 for what the batch does not declare."""
    counts = []
    for name in UNITS:
        value = batch.get(name)
        if value is None:
            counts.append(0.0)
        elif value.ndim >= 2:
            counts.append(float(value.numel()))
        else:
            counts.append(float(value.sum()))
    return counts


def peak_memory_bytes() -> float:
    """Largest resident set of this process so far, bytes (Linux counts KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


class Meter:
    """Counts units and seconds, across resumptions: `totals` is kept in checkpoints."""

    def __init__(self, totals: Mapping[str, float]) -> None:
        self.totals = {"seconds": 0.0, "examples": 0.0, "steps": 0.0, "peak_memory_bytes": 0.0}
        self.totals |= dict.fromkeys(UNITS.values(), 0.0) | dict(totals)
        self._mark = time.perf_counter()

    def count(self, *, examples: int, units: list[float]) -> None:
        """Add one optimizer step over all workers."""
        self.totals["steps"] += 1
        self.totals["examples"] += examples
        for name, amount in zip(UNITS.values(), units, strict=True):
            self.totals[name] += amount

    def settle(self, peak_memory: float) -> dict[str, float]:
        """Add the time since the last call; returns the totals for a checkpoint."""
        now = time.perf_counter()
        self.totals["seconds"] += now - self._mark
        self._mark = now
        self.totals["peak_memory_bytes"] = max(self.totals["peak_memory_bytes"], peak_memory)
        return dict(self.totals)


def measurements(
    totals: Mapping[str, float], config: TrainingConfig, workers: int
) -> dict[str, float]:
    """The measurements of a finished training from a meter's totals."""
    seconds = max(totals["seconds"], 1e-9)
    cpu_hours = seconds * workers * config.cpus_per_worker / 3600
    gpu_hours = seconds * workers * config.gpus_per_worker / 3600
    facts = {
        "training_seconds": totals["seconds"],
        "optimizer_steps": totals["steps"],
        "examples_per_second": totals["examples"] / seconds,
        "workers": float(workers),
        "cpu_hours": cpu_hours,
        "gpu_hours": gpu_hours,
        "energy_kwh_estimate": (cpu_hours * CPU_CORE_WATTS + gpu_hours * GPU_WATTS) / 1000,
        "peak_memory_bytes": totals["peak_memory_bytes"],
    }
    for name in UNITS.values():
        if totals[name]:
            facts[f"{name}_per_second"] = totals[name] / seconds
    return facts

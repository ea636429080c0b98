"""Running a task without Ray: a local runtime, a folder for the output, a manifest by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from goldcrest.cluster.artifact import Artifact, Output, describe_files
from goldcrest.cluster.runtime import LocalRuntime

RunTask = Callable[..., Artifact]


def runner(folder: Path) -> RunTask:
    """`run(task, cfg, *inputs, seed=0)` -> the artifact that the task wrote under `folder`."""
    count = 0

    def run(task: Any, cfg: Any, *inputs: Any, seed: int = 0, **named: Any) -> Artifact:
        nonlocal count
        count += 1
        place = folder / "artifacts" / f"{count:03d}-{task.name}"
        place.mkdir(parents=True)
        scratch = folder / "scratch" / place.name
        out = Output(place, runtime=LocalRuntime(), seed=seed, scratch=scratch)
        task(cfg, *inputs, out=out, **named)
        manifest = {
            "key": f"{count:064x}",
            "step": task.name,
            "files": describe_files(place),
            "metrics": out.collected_metrics,
            "measurements": out.measurements,
        }
        (place / "manifest.json").write_text(json.dumps(manifest))
        return Artifact.at(place)

    return run


@pytest.fixture
def run_task(tmp_path: Path) -> RunTask:
    """`run_task(task, cfg, *inputs, seed=0)` -> the artifact that the task wrote."""
    return runner(tmp_path)


def voice(pitch: float, seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    """A buzzing, amplitude-modulated harmonic tone with noise: enough to pass for speech here."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6)) / k for k in range(1, 12))
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * rng.uniform(2, 4) * t + rng.uniform(0, 6))
    wave = 0.1 * tone * envelope + 0.003 * rng.standard_normal(len(t))
    return wave.astype(np.float32)


@pytest.fixture
def speech_folder(tmp_path: Path) -> Path:
    """A folder per speaker: four "speakers" of different pitch, three utterances each."""
    root = tmp_path / "corpus"
    for number, pitch in enumerate((90.0, 130.0, 180.0, 240.0)):
        folder = root / f"speaker{number}"
        folder.mkdir(parents=True)
        for take in range(3):
            samples = voice(pitch, 1.2 + 0.3 * take, seed=10 * number + take)
            soundfile.write(folder / f"take{take}.wav", samples, 16_000)
    return root

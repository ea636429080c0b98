"""A small untrained speaker bundle, and `goldcrest serve` on it as a process of its own."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import soundfile

ROOT = Path(__file__).parents[2]
NETWORK = {
    "channels": 16,
    "mfa_channels": 24,
    "attention_channels": 8,
    "se_channels": 8,
    "embedding_dim": 12,
}
THRESHOLDS = {"eer": 0.5, "far_0.1": 0.4, "far_0.05": 0.55, "far_0.01": 0.7}
START_SECONDS = 240.0


def make_bundle(
    folder: Path, *, seed: int = 0, thresholds: Mapping[str, float] | None = None
) -> Path:
    """A bundle of random weights with a hand-written calibration (none for `thresholds={}`)."""
    import torch

    from goldcrest.cluster.artifact import Output
    from goldcrest.cluster.runtime import LocalRuntime
    from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings, EcapaTdnn
    from goldcrest.tasks.speaker.bundle import write_bundle
    from goldcrest.tasks.speaker.frontend import FrontEndConfig

    folder.mkdir(parents=True)
    front_end = FrontEndConfig()
    settings = EcapaSettings(input_dim=front_end.network_dimensions, **NETWORK)
    torch.manual_seed(seed)
    out = Output(folder, runtime=LocalRuntime(), seed=0, scratch=folder.parent / "scratch")
    write_bundle(
        out,
        name="dense",
        tensors=EcapaTdnn(settings).state_dict(),
        network=dataclasses.asdict(settings),
        front_end=front_end.model_dump(mode="json"),
        facts={},
    )
    if thresholds is None or thresholds:
        calibration = make_calibration(thresholds or THRESHOLDS)
        (folder / "calibration.json").write_text(json.dumps(calibration))
    return folder


def make_calibration(thresholds: Mapping[str, float]) -> dict[str, Any]:
    """What the pipeline writes, with counts that look like two overlapping hills."""
    edges = np.linspace(-1, 1, 51)
    middles = (edges[:-1] + edges[1:]) / 2
    return {
        "system": "dense",
        "score": "cosine",
        "eer": 13.7,
        "trials": 32052,
        "thresholds": dict(thresholds),
        "histogram": {
            "edges": edges.tolist(),
            "target": [int(900 * np.exp(-(((m - 0.7) / 0.2) ** 2))) for m in middles],
            "nontarget": [int(900 * np.exp(-(((m - 0.1) / 0.25) ** 2))) for m in middles],
        },
    }


def voice(pitch: float, *, seconds: float = 1.5, seed: int = 0) -> bytes:
    """A WAV file of a buzzing tone: a recording that is its own and no other's."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16_000)) / 16_000
    tone = sum(np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6)) / k for k in range(1, 12))
    wave = 0.1 * tone + 0.01 * rng.standard_normal(len(t))
    return wav(wave)


def wav(
    samples: np.ndarray,
    rate: int = 16_000,
    container: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    """Samples (N,) or (N, channels) as an audio file; integers, unless `subtype` says "FLOAT"."""
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, subtype, format=container)
    return sink.getvalue()


@dataclass
class Server:
    """A running `goldcrest serve`."""

    process: subprocess.Popen[str]
    url: str
    token: str
    folder: Path

    def call(
        self, method: str, path: str, *audio: bytes, headers: Any = None, **form: Any
    ) -> requests.Response:
        """One request with the token, files in the field `audio`."""
        files = [("audio", (f"{n}.wav", content)) for n, content in enumerate(audio)]
        headers = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        return requests.request(
            method,
            self.url + path,
            headers=headers,
            data=form or None,
            files=files or None,
            timeout=60,
        )

    def post(self, path: str, *audio: bytes, **form: Any) -> requests.Response:
        """A form with files in the field `audio`."""
        return self.call("POST", path, *audio, **form)

    def log(self) -> str:
        """What the process has printed."""
        return (self.folder / "log.txt").read_text()

    def wait_for_log(self, words: str, seconds: float = 60.0) -> None:
        """Wait until the process has printed `words`."""
        limit = time.monotonic() + seconds
        while words not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < limit, self.log()
            time.sleep(0.1)

    def replicas(self, deployment: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        import psutil

        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                told = " ".join(child.cmdline() or [child.name()])
                if f"ServeReplica:goldcrest:{deployment}" in told:
                    found.append(child.pid)
        return found

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, as a supervisor does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def start_server(folder: Path, *arguments: str, token: str = "", store: str = "") -> Server:
    """`goldcrest serve ARGUMENTS` in `folder`, up and ready."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "up.json"
    command = [sys.executable, "-m", "goldcrest", "serve", *arguments, "--json", str(answer)]
    if token:
        path = folder / "token"
        path.touch(mode=0o600)
        path.write_text(token + "\n")
        command += ["--token-file", str(path)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", "0"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    server = Server(process, "", token, folder)
    limit = time.monotonic() + START_SECONDS
    while not answer.is_file():
        assert process.poll() is None, server.log()
        assert time.monotonic() < limit, server.log()
        time.sleep(0.05)
    server.url = json.loads(answer.read_text())["url"]
    return server

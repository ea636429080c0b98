"""The model side of the speaker endpoint: recordings in, embeddings out.

Replicas hold several bundles at once (Serve's multiplexing, least recently used out), decode, run
the front end per recording, and embed what waits as one batch. Nobody waits for a batch to fill: it
is what arrived while the one before was computed, so a lone request loses no time.

A recording's embedding does not depend on its batch: recordings of similar length are padded
together and the network masks the padding (`SpeakerModel.embed_batch`).

Decoding happens here and not in the HTTP side: should a decoder crash on a hostile file, this
process dies alone, is started again, and the HTTP side asks another replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from ray import serve

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.runtime import limit_threads
from goldcrest.pipelines.endpoints import bundles
from goldcrest.pipelines.endpoints.speaker_calibration import read_calibration
from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice
from goldcrest.tasks.data.audio import AudioError, AudioLimits, decode
from goldcrest.tasks.speaker.bundle import SpeakerModel, load_bundle, read_description

MAX_MODEL_BYTES = 4 << 30
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Embedded:
    """One recording: its embedding (E,) float32 and seconds, or why there is none."""

    vector: np.ndarray | None
    seconds: float = 0.0
    refused: str = ""


def model_id(folder: Path) -> str:
    """`fingerprint@folder` of a speaker bundle."""
    return bundles.model_id(folder, ("bundle.json", _WEIGHTS), max_bytes=MAX_MODEL_BYTES)


def members(folder: Path) -> list[str]:
    """Files of a bundle that serving reads."""
    found = ("bundle.json", _WEIGHTS, "calibration.json")
    return [name for name in found if (folder / name).is_file()]


class SpeakerModels:
    """A replica with some loaded bundles; a deployment by `speaker.application`."""

    def __init__(
        self,
        *,
        max_seconds: float,
        min_seconds: float,
        max_batch: int,
        cpus: float,
        gpus: float = 0.0,
    ) -> None:
        limit_threads(cpus)
        self._device = "cuda" if gpus else "cpu"
        self._limits = AudioLimits(max_seconds=max_seconds, min_seconds=min_seconds, max_channels=8)
        self._warm: WeakValueDictionary[str, SpeakerModel] = WeakValueDictionary()  # those that ran
        batched: Any = self._batched  # what `serve.batch` makes of it has settings
        batched.set_max_batch_size(max_batch)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Have every bundle of the choice in memory: Serve sends a model's requests to replicas
        that hold it, so one that started without would never be asked."""
        folders = ModelChoice.read(user_config).bundles.values()
        bundles.hold(self, bundles.MOST_HELD)
        for folder in folders:
            await self.load(await asyncio.to_thread(model_id, folder))
        bundles.hold(self, 2 * len(folders))  # these, and those that replace them

    async def describe(self, folder: str) -> dict[str, Any]:
        """What a bundle is: its `model` id, facts, and calibration; InputError when it is none."""
        return await asyncio.to_thread(_describe, Path(folder))

    async def load(self, model: str) -> None:
        """Have a bundle in memory and run once: the first request finds it warm."""
        loaded = await self._model(model)
        if self._warm.get(model) is loaded:
            return
        noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
        await asyncio.to_thread(loaded.embed_waveform, noise)
        self._warm[model] = loaded

    async def embed(self, recordings: Sequence[bytes]) -> list[Embedded]:
        """Embed encoded recordings with the bundle that the call is routed for."""
        model = serve.get_multiplexed_model_id()
        loaded = await self._model(model)
        return list(await asyncio.gather(*(self._one(loaded, each) for each in recordings)))

    async def _one(self, loaded: SpeakerModel, recording: bytes) -> Embedded:
        try:
            samples, frames = await asyncio.to_thread(_frames, loaded, recording, self._limits)
        except AudioError as reason:
            return Embedded(None, refused=str(reason))
        vector = await self._batched(frames)
        if not np.isfinite(vector).all():  # enrolled, it would make its speaker's mean NaN
            return Embedded(None, refused="the model has no finite embedding for it")
        return Embedded(vector, seconds=len(samples) / 16_000)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.0)
    async def _batched(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Embed what waits; Serve never mixes the requests of two models in one batch."""
        loaded = await self._model(serve.get_multiplexed_model_id())
        return list(await asyncio.to_thread(loaded.embed_batch, frames))

    @serve.multiplexed(max_num_models_per_replica=bundles.MOST_HELD)  # type: ignore[untyped-decorator]
    async def _model(self, model: str) -> SpeakerModel:
        """Load a bundle; the id names the content, so a folder that changed is another model."""
        return await asyncio.to_thread(_load, model, self._device)


def _load(model: str, device: str) -> SpeakerModel:
    """The bundle on the device, where it can compute there (INT8 is the CPU's)."""
    folder = bundles.folder_of(model)
    if model_id(folder) != model:
        raise InputError(f"the bundle {folder} has changed since it was taken into service")
    return load_bundle(folder, device)


def _describe(folder: Path) -> dict[str, Any]:
    facts = read_description(folder)
    calibration = read_calibration(folder, system=str(facts["name"]))
    return {
        "model": model_id(folder),
        "name": facts["name"],
        "dimensions": int(facts["network"]["embedding_dim"]),
        "parameters": facts.get("parameters"),
        "calibration": calibration.model_dump() if calibration is not None else None,
    }


def _frames(
    loaded: SpeakerModel, recording: bytes, limits: AudioLimits
) -> tuple[np.ndarray, np.ndarray]:
    samples = decode(recording, limits)
    return samples, loaded.front_end.fbank(samples)

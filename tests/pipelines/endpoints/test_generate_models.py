"""The model side of the generate endpoint, and what it is asked by default, without Serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import multiplex

from goldcrest.pipelines.endpoints import generate_models
from goldcrest.pipelines.endpoints.generate import GenerateEndpoint, GenerateSettings
from goldcrest.pipelines.endpoints.generate_calls import Served
from goldcrest.pipelines.endpoints.generate_models import (
    Completed,
    Job,
    Loaded,
    TextModels,
    model_id,
)
from goldcrest.pipelines.endpoints.generate_prompts import PromptReader
from goldcrest.pipelines.endpoints.generate_requests import CompletionRequest
from goldcrest.tasks.language import quality
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from tests.pipelines.text_server import make_speech_bundle, make_text_bundle
from tests.tasks.language.writing_models import tiny_bundle


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> TextModels:
    """A replica that has loaded nothing yet."""
    context = SimpleNamespace(app_name="a", deployment="d", replica_id="r")
    pusher = SimpleNamespace(register_or_update_task=lambda *_: None, start=lambda: None)
    monkeypatch.setattr(multiplex, "_get_internal_replica_context", lambda: context)
    monkeypatch.setattr(multiplex, "MetricsPusher", lambda: pusher)
    monkeypatch.setattr(generate_models, "limit_threads", lambda _: None)
    return TextModels(max_context=100, parallel=1, max_batch=64, cpus=1)


@pytest.mark.parametrize("make", [make_text_bundle, make_speech_bundle])
def test_a_batch_of_the_replica_is_one_of_the_model(
    replica: TextModels, tmp_path: Path, make: Any
) -> None:
    """Else prompts that share a place would wait for each other in batches of another size."""
    model = model_id(make(tmp_path / "bundle"))
    loaded: Loaded = asyncio.run(replica._model(model))
    assert loaded.generator.batch_size == 64


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
def test_a_replica_with_a_gpu_computes_there(
    replica: TextModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, device: str
) -> None:
    """What the replica asks for; the device "meta" stands for one that this machine lacks."""
    asked: list[str] = []

    def load_on(folder: Path, device: str) -> Any:
        asked.append(device)
        return quality.load_on(folder, "meta")

    monkeypatch.setattr(generate_models, "load_on", load_on)
    replica = TextModels(max_context=100, parallel=1, max_batch=64, cpus=1, gpus=gpus)
    loaded: Loaded = asyncio.run(replica._model(model_id(make_text_bundle(tmp_path / "bundle"))))
    assert asked == [device]
    assert loaded.generator.model.device.type == "meta"


def test_an_encoder_decoder_refuses_what_has_no_positions(replica: TextModels) -> None:
    """The prompt by those of the encoder, the answer by those of the decoder."""
    bundle = tiny_bundle("t5")
    bundle.model.config.max_position_embeddings = 20
    loaded = Loaded(Generator(bundle), PromptReader(bundle))
    settings = GenerationSettings(max_new_tokens=500)

    def prepared(prompt: str, tokens: int | None) -> list[tuple[int, int]]:
        made = replica._prepare(loaded, Job((prompt,), settings, tokens))
        return [(len(each.tokens), each.settings.max_new_tokens) for each in made]

    assert prepared("p" * 19, None) == prepared("p" * 19, 20) == [(20, 20)]
    for prompt, tokens in (("p" * 20, 1), ("p", 21)):
        with pytest.raises(Exception, match="20 tokens of the prompt and 20 of the answer"):
            prepared(prompt, tokens)


@pytest.mark.parametrize(("most", "expected"), [(8, 8), (16, 16), (500, 16)])
def test_the_default_length_is_one_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    """OpenAI's 16 tokens, where the endpoint's own limit is not below them."""
    asked: list[Job] = []

    async def complete(_: Served, job: Job) -> Completed:
        asked.append(job)
        return Completed([], 1)

    monkeypatch.setattr(Served, "complete", complete)
    nothing: Any = None
    endpoint = GenerateEndpoint(
        GenerateSettings(models={"bundles": {"one": "/one"}}, max_tokens=most), nothing
    )
    endpoint._served = {"one": Served("one", "f", nothing, {})}
    request: Any = SimpleNamespace(scope={})
    asyncio.run(endpoint.completions(CompletionRequest(prompt="a"), request))  # type: ignore[arg-type]
    assert [job.max_tokens for job in asked] == [expected]

"""Latency, throughput and memory of one bundle, measured in a process of its own.

The peak of a process's memory never falls again, and what was loaded before warms caches and holds
pages: only a process that has done nothing else tells what a bundle needs. Run by hand:

    python -m goldcrest.tasks.language.speed FOLDER '{"threads": 2}'

One prompt, greedy, no beams: `first_token_ms` is the time from the prompt to the first token
(prefill; the encoder too), `next_token_ms` the median of the steps after it, `tokens_per_second`
the new tokens over the whole time. A masked model has no next token: `first_token_ms` is then one
pass over the prompt and `tokens_per_second` its tokens over that time. A speech model hears noise
for as long as its window is, and writes after the tokens that begin every transcript, at most what
its decoder has positions for.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from goldcrest.cluster.api import Config, StepError

if TYPE_CHECKING:
    import numpy as np

    from goldcrest.tasks.language.bundle import LanguageModel
    from goldcrest.tasks.language.transcription import Transcriber


class SpeedConfig(Config):
    """How latency is measured."""

    prompt_tokens: int = Field(
        32, ge=1, description="tokens of the prompt; fewer where the context is too short"
    )
    new_tokens: int = Field(
        32,
        ge=2,
        description="tokens that are generated after it; fewer where the context is too short",
    )
    repeats: int = Field(5, ge=1, description="times that this is done, after one that warms up")
    threads: int = Field(1, ge=1, description="CPU threads")


def measure_speed(folder: Path, config: SpeedConfig, *, device: str = "cpu") -> dict[str, float]:
    """Measurements of the bundle in `folder`, made by a fresh process.

    An INT8 bundle is measured on the CPU whatever `device` says: it computes nowhere else.
    Raises StepError with the last line of what the process said, if it failed.
    """
    threads = str(config.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {
        **os.environ,
        **dict.fromkeys(names, threads),
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
    }
    command = [sys.executable, "-m", __name__, str(folder), config.model_dump_json(), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise StepError(f"the speed of {folder} could not be measured: {said[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_here(folder: Path, config: SpeedConfig, device: str) -> dict[str, float]:
    """Measurements of the bundle in `folder`, made by this process, which must be fresh."""
    from goldcrest.tasks.language import generation
    from goldcrest.tasks.language.bundle import device_for, read_description
    from goldcrest.tasks.language.quality import load_on
    from goldcrest.tasks.language.transcription import Transcriber

    facts = read_description(folder)
    family, device = facts["family"], device_for(facts, device)
    import torch

    # What any model needs of the libraries is there before the first figure is taken.
    from goldcrest.kernels.language.architectures import longest_text

    torch.set_num_threads(config.threads)
    before = _peak_mb(device)
    start = time.perf_counter()
    bundle = load_on(folder, device)
    loaded = time.perf_counter() - start
    config = _fitting(config, longest_text(bundle.model.config), family)
    prompt = [] if family == "speech" else _prompt(bundle, config.prompt_tokens)
    if family in generation.WRITERS:
        times = _time_writer(generation.Generator(bundle), prompt, config)
    elif family == "speech":
        transcriber = Transcriber(bundle)
        prompt = transcriber.begin
        room = transcriber.context - len(prompt) if transcriber.context else config.new_tokens
        fitting = config.model_copy(update={"new_tokens": min(config.new_tokens, room)})
        times = _time_writer(transcriber, _noise(transcriber), fitting)
    else:
        times = _time_reader(bundle, prompt, config)
    return {
        **times,
        "load_seconds": loaded,
        "peak_mb": _peak_mb(device),
        "before_loading_mb": before,
        "threads": config.threads,
        "prompt_tokens": len(prompt),
    }


def _time_writer(generator: Any, prompt: Any, config: SpeedConfig) -> dict[str, float]:
    """Times of a model that writes token by token."""
    first, following, whole = [], [], []
    for turn in range(config.repeats + 1):
        seconds = generator.step_seconds(prompt, config.new_tokens)
        if turn > 0:  # the first one warms up
            first.append(seconds[0])
            following += seconds[1:]
            whole.append(sum(seconds))
    return {
        "first_token_ms": 1000 * statistics.median(first),
        "next_token_ms": 1000 * statistics.median(following),
        "tokens_per_second": config.new_tokens / statistics.median(whole),
        "new_tokens": config.new_tokens,
    }


def _noise(transcriber: Transcriber) -> np.ndarray:
    """Features (T, M) of a whole window: what is heard does not matter to the clock."""
    import numpy as np

    shape = (transcriber.frames, transcriber.mel_bins)
    return np.random.default_rng(0).random(shape, np.float32)


def _time_reader(bundle: LanguageModel, prompt: list[int], config: SpeedConfig) -> dict[str, float]:
    """Times of a model that reads a text at once."""
    import torch

    ids = torch.tensor([prompt], device=bundle.model.device)
    seconds = []
    for turn in range(config.repeats + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            bundle.model(input_ids=ids).logits.argmax(dim=-1).tolist()  # waits for a GPU
        if turn > 0:
            seconds.append(time.perf_counter() - start)
    spent = statistics.median(seconds)
    return {"first_token_ms": 1000 * spent, "tokens_per_second": len(prompt) / spent}


def _fitting(config: SpeedConfig, limit: int | None, family: str) -> SpeedConfig:
    """The config with tokens that a context of `limit` has room for, half of it for either part.

    Only a causal model's prompt and new tokens share one.
    """
    if limit is None:
        return config
    prompt, new = min(config.prompt_tokens, limit), min(config.new_tokens, limit)
    if family == "causal" and prompt + new > limit:
        new = max(2, min(new, max(limit // 2, limit - prompt)))
        prompt = max(1, limit - new)
    return config.model_copy(update={"prompt_tokens": prompt, "new_tokens": new})


def _prompt(bundle: LanguageModel, tokens: int) -> list[int]:
    """Ordinary tokens, none of them special: what they say does not matter to the clock."""
    special = set(bundle.tokenizer.all_special_ids)
    plain = [token for token in range(len(bundle.tokenizer)) if token not in special]
    return [plain[7 * i % len(plain)] for i in range(tokens)]


def _peak_mb(device: str) -> float:
    """Most memory so far in MB (10^6 bytes): resident in this process, or held on the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: it starts from the peak of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    _folder, _config, _device = (*sys.argv[1:], "{}", "cpu")[:3]
    _measured = measure_here(Path(_folder), SpeedConfig.model_validate_json(_config), _device)
    sys.stdout.write("\n" + json.dumps(_measured) + "\n")

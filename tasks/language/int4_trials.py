"""One trial of the INT4 search, on a worker: quantize the model by a recipe, measure what is left.

A trial leaves two files in the step's scratch folder: the tensors of the quantized model, then what
was measured. A step that was killed goes on after the trials that it had finished, and the model of
the chosen recipe need not be quantized a second time.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from goldcrest.tasks.data.tokens import TokenRow, cut
from goldcrest.tasks.language.bundle import load_config, load_model
from goldcrest.tasks.language.rows import open_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from goldcrest.kernels.weight_only.search import Recipe
    from goldcrest.kernels.weight_only.transformer import Options
    from goldcrest.tasks.language.collator import Collator

Metric = Literal["perplexity", "loss", "accuracy"]
"""What the search keeps within its tolerance; of these, accuracy alone is better when higher."""

PROMPT, DECODED = 32, 16
"""Tokens of the prompt and tokens decoded after it, for the latencies."""
PIECE, PIECED_ROWS = 16, 16
"""Tokens that are read at a time, and rows, to see what decoding loses."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What every trial works on. It holds paths, not tensors: it travels to workers."""

    bundle: Path  # the float model
    train: Path  # token rows to calibrate on
    validation: Path  # token rows to measure on
    calibration: int  # rows
    length: int  # tokens of a calibration row at most
    evaluation: int  # rows, the first ones
    batch_tokens: int  # of a batch that is measured
    collate: Collator
    seed: int
    options: Options  # how methods are driven
    device: str
    scratch: Path

    @property
    def family(self) -> str:
        """Of the model: causal, seq2seq, masked or speech."""
        return self.collate.family

    @property
    def positions(self) -> int:
        """Of a speech model's encoder, whatever the row; 0 of others."""
        return self.collate.frames // 2

    def rows(self) -> dict[str, int]:
        """How many rows there are to calibrate on ("train") and to measure on ("validation")."""
        paths = {"train": self.train, "validation": self.validation}
        return {name: len(open_rows(path, self.family)) for name, path in paths.items()}

    def load(self) -> Any:
        """The float model on its device."""
        model: Any = load_model(self.bundle)
        return model.to(self.device)

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """A seeded choice of training rows, cut to length, one row a batch: nothing is padded."""
        reader = open_rows(self.train, self.family)
        chosen = np.random.default_rng([self.seed, 4]).permutation(len(reader))[: self.calibration]
        return [
            self._collate([cut(reader[int(row)], self.length, self.family)], int(row))
            for row in chosen
        ]

    def evaluation_batches(self) -> list[dict[str, Tensor]]:
        """The first validation rows in batches of alike lengths, about `batch_tokens` each."""
        reader = open_rows(self.validation, self.family)
        rows = sorted(
            range(min(self.evaluation, len(reader))), key=lambda r: int(reader.lengths[r])
        )
        groups: list[list[int]] = []
        for row in rows:  # the longest comes last
            width = max(int(reader.lengths[row]), self.positions)
            if groups and (len(groups[-1]) + 1) * width <= self.batch_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
        return [self._collate([reader[row] for row in group], group[0]) for group in groups]

    def _collate(self, rows: Sequence[TokenRow], number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, 5, number])  # the same gaps in every trial
        return {name: value.to(self.device) for name, value in self.collate(rows, rng).items()}


def baseline(metric: Metric, *, material: Material) -> dict[str, Any]:
    """The float model's scores and latencies; `metric` is the one that will be asked for."""
    from goldcrest.tasks.language.documents import check_reading

    model = material.load()
    for path, most in ((material.train, material.length), (material.validation, None)):
        check_reading(model, material.collate, open_rows(path, material.family), cut=most)
    scores = measure(model, material.evaluation_batches(), material.family)
    told = {"metric": scores[metric], **scores, **latencies(model, material)}
    return told | {"pieced_loss": pieced_loss(model, material)}


def sensitivities(recipe: Recipe, *, material: Material) -> dict[str, Any]:
    """How much each layer suffers from the recipe's grid, and how many weights it has."""
    from goldcrest.kernels.weight_only import transformer

    model = material.load()
    spared = (*recipe.high_precision, *recipe.eight_bits)
    errors = transformer.sensitivities(model, material.calibration_batches(), recipe.grid, spared)
    weights = {name: model.get_submodule(name).weight.numel() for name in errors}
    return {"errors": errors, "weights": weights}


def trial(recipe: Recipe, *, material: Material, metric: Metric) -> dict[str, Any]:
    """Quantize and measure, or what an earlier life of this step measured of the recipe.

    A recipe that the kernel refuses (scales that overflow, say) is a trial with an `error`.
    """
    told = trial_file(material.scratch, recipe, "json")
    if told.is_file():
        known: dict[str, Any] = json.loads(told.read_text("utf-8"))
        return known
    try:
        result = _run(recipe, material, metric)
    except ValueError as error:
        result = {"error": str(error), "metric": None, "bytes": 0}
    partial = told.with_suffix(".part")
    partial.write_text(json.dumps(result), "utf-8")
    partial.replace(told)
    return result


def trial_file(scratch: Path, recipe: Recipe, kind: str) -> Path:
    """Where a trial leaves its tensors ("safetensors") or what was measured ("json")."""
    name = hashlib.sha256(json.dumps(recipe.record(), sort_keys=True).encode()).hexdigest()[:24]
    folder = scratch / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.{kind}"


def _run(recipe: Recipe, material: Material, metric: Metric) -> dict[str, Any]:
    from safetensors.torch import save_file

    from goldcrest.kernels.language.architectures import own_state
    from goldcrest.kernels.weight_only import checkpoint, load, transformer

    started = time.monotonic()
    model = material.load()
    description = transformer.quantize(
        model,
        material.calibration_batches(),
        method=recipe.method,
        grid=recipe.grid,
        settings=load(recipe.method).Settings(**recipe.settings),
        high_precision=recipe.high_precision,
        eight_bits=recipe.eight_bits,
        options=material.options,
        seed=material.seed,
    )
    seconds = time.monotonic() - started
    scores = measure(model, material.evaluation_batches(), material.family)
    finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    state = {name: value.cpu().contiguous() for name, value in own_state(model).items()}
    stored, plain = checkpoint.quantized_bytes(state)
    path = trial_file(material.scratch, recipe, "safetensors")
    partial = path.with_suffix(".part")
    save_file(state, partial)
    partial.replace(path)
    return {
        "metric": finite[metric],
        "scores": finite,
        "bytes": checkpoint.bytes_of(state),
        "quantized_bytes": stored,
        "quantized_float32_bytes": plain,
        "description": description,
        "pieced_loss": pieced_loss(model, material),
        "measured": {"quantize_seconds": seconds, **latencies(model, material)},
    }


def measure(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], family: str
) -> dict[str, float]:
    """Loss (nats per token), perplexity and accuracy (share of tokens guessed), labels given."""
    import torch
    from torch.nn import functional as F

    total, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches:
            labels = batch["labels"]
            given = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**given).logits.float()
            if family == "causal":
                logits, labels = logits[:, :-1], labels[:, 1:]
            counted = labels != -100
            logits, labels = logits[counted], labels[counted]
            total += float(F.cross_entropy(logits, labels, reduction="sum").double())
            right += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
    loss = total / count if count else math.nan
    bounded = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan
    return {"loss": loss, "perplexity": bounded, "accuracy": right / max(1, count)}


def pieced_loss(model: nn.Module, material: Material) -> float | None:
    """Nats per token of the first validation rows, read a few tokens at a time behind a cache.

    So a causal model reads when it writes. None of other families, and where a row's loss is not
    finite. Of a packed row the first document counts.
    """
    import torch
    from torch.nn import functional as F

    if material.family != "causal":
        return None
    reader = open_rows(material.validation, material.family)
    total, count = 0.0, 0
    for place in range(min(PIECED_ROWS, len(reader))):
        row = reader[place]
        end = int(row.starts[1]) if len(row.starts) > 1 else len(row)
        tokens = np.concatenate([row.prompt, row.answer])[:end].astype(np.int64)
        ids = torch.from_numpy(tokens)[None].to(material.device)
        cache, logits = None, []
        with torch.inference_mode():
            for start in range(0, len(tokens) - 1, PIECE):
                piece = ids[:, start : min(start + PIECE, len(tokens) - 1)]
                output = model(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits[0].float())
        first = max(len(row.prompt), 1)  # the first token that is predicted
        if first < len(tokens):
            said = torch.cat(logits)[first - 1 :]
            total += float(F.cross_entropy(said, ids[0, first:], reduction="sum").double())
            count += len(tokens) - first
    loss = total / count if count else math.nan
    return loss if math.isfinite(loss) else None


def latencies(model: nn.Module, material: Material) -> dict[str, float]:
    """Milliseconds to the first token and to each next one of a causal model, greedy, batch 1."""
    import torch

    from goldcrest.kernels.language.architectures import longest_text

    if material.family != "causal":
        return {}
    reader = open_rows(material.validation, material.family)
    row = reader[int(np.argmax(reader.lengths))]
    most = longest_text(load_config(material.bundle)) or PROMPT + DECODED
    decoded = min(DECODED, most - 1)  # a prompt of one token and those have positions
    tokens = np.concatenate([row.prompt, row.answer])[: min(PROMPT, most - decoded)]
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(material.device)
    with torch.inference_mode():
        _decode(model, ids, min(2, decoded))  # packs weights, warms caches
        first, following = _decode(model, ids, decoded)
    return {"first_token_ms": 1e3 * first, "next_token_ms": 1e3 * following / max(decoded, 1)}


def _decode(model: nn.Module, ids: torch.Tensor, count: int) -> tuple[float, float]:
    """Seconds of the prompt, and of `count` tokens after it."""
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    token = output.logits[:, -1:].argmax(dim=-1)
    first = time.perf_counter() - started
    for _ in range(count):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    float(token[0, 0])  # waits for a device that works ahead
    return first, time.perf_counter() - started - first

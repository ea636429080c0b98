"""Evaluate: how well, how large and how fast the language models of a run are.

    perplexity, bits per character   on token rows of a split: every model
    task metrics                     on answers that are generated for prompts of that split, of a
                                     speech model on what it hears in the audio
    sizes, latency, memory           of every bundle

Quality has bootstrap intervals over examples (95 %), and beside `dense` the paired interval of the
difference to it: all models answer the same examples. Percentages are 0 to 100; perplexity and the
error rates (ter, wer, cer) are better when lower.

Metrics: language.<model>.{perplexity, bits_per_char, bits_per_byte, entropy, <task metric>} and
`<each>_ci`; language.<model>.unanswered: prompts that the model can't read, being longer than its
context, say (their answer is ""); language_minus_dense.<model>.<each>{,_ci}; models.<model>.{bytes,
parameters, sparsity, bits, tokens_per_second, first_token_ms, next_token_ms, peak_mb, ...} (the
last four are measured).

Artifact: losses (model, row, nll, entropy, tokens, characters, bytes), answers (model, id, prompt,
answer, references: some to read), prompts (bos: whether they began with the tokenizer's bos, as the
token rows do), the figures quality_by_sparsity and quality_by_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.language import quality
from goldcrest.tasks.language.bundle import bundle_bytes, read_description, verified
from goldcrest.tasks.language.examples import Example, Split, read_examples
from goldcrest.tasks.language.generation import WRITERS, GenerationSettings
from goldcrest.tasks.language.rows import open_rows, rows_file
from goldcrest.tasks.language.speed import SpeedConfig, measure_speed

if TYPE_CHECKING:
    from goldcrest.kernels.metrics.additive import Additive

TextMetric = Literal[
    "exact_match", "gsm8k", "bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "wer", "cer"
]


class EvaluateTextConfig(Config):
    """What is measured, on how many examples."""

    split: Split = Field("test", description="split of the corpus that is evaluated on")
    loss_rows: int | None = Field(
        1000, ge=1, description="token rows of the perplexity, drawn at random; None: all"
    )
    batch_rows: int = Field(8, ge=1, description="token rows per forward pass")
    metrics: tuple[TextMetric, ...] = Field(
        (),
        description="metrics of generated answers; none, or plain text, which has no answers to "
        "compare with: they are only written to be read",
    )
    examples: int | None = Field(
        200, ge=1, description="prompts that are answered, drawn at random; None: all"
    )
    generation: GenerationSettings = Field(
        GenerationSettings(), description="how answers are generated"
    )
    batch_prompts: int = Field(16, ge=1, description="prompts that are answered together")
    plain_speech: bool = Field(
        True, description="compare lower-case words without punctuation for wer and cer"
    )
    shown: int = Field(20, ge=0, description="answers per model that are kept to be read")
    bootstrap: int = Field(500, ge=10, description="replicates of the confidence intervals")
    speed: SpeedConfig | None = Field(
        SpeedConfig(), description="how latency and memory are measured; None: they are not"
    )
    shard_rows: int = Field(
        256, ge=1, description="token rows (or prompts) per piece of parallel work"
    )

    @model_validator(mode="after")
    def _metrics_once(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"a metric is named twice: {', '.join(self.metrics)}")
        return self


@task(cpus=0, timeout="24h")
def evaluate_text(
    cfg: EvaluateTextConfig,
    corpus: Artifact,
    tokens: Artifact,
    out: Output,
    **models: Artifact,
) -> None:
    """Measure every bundle of `models`, by name, on a split of the corpus."""
    if not models:
        raise StepError("there is no model to evaluate", hint="name at least one bundle")
    folders = {name: verified(bundle) for name, bundle in models.items()}
    facts = {name: read_description(folder) for name, folder in folders.items()}
    families = {each["family"] for each in facts.values()}
    if "speech" in families and len(families) > 1:
        raise StepError("a speech model and a model of text can't be evaluated on the same rows")
    if cfg.metrics and families.isdisjoint((*WRITERS, "speech")):
        out.progress(None, f"masked models write no answers: {', '.join(cfg.metrics)} left out")
    if not families.isdisjoint(WRITERS):
        _check_references(cfg, corpus, out.seed)
    found: dict[str, dict[str, Additive]] = {name: {} for name in folders}
    for name, measured in _losses(cfg, tokens, folders, "speech" in families, out).items():
        found[name].update(measured)
    for name, measured in _answers(cfg, corpus, tokens, folders, facts, out).items():
        found[name].update(measured)
    language = _report(cfg, found, out)
    out.json("prompts", {"bos": tokens.json("facts")["bos"]})
    sizes = _sizes(folders, facts)
    out.metrics(models=sizes)
    _figures(language, sizes, out)
    if cfg.speed is not None:
        _measure_speed(cfg.speed, folders, out)


def _check_references(cfg: EvaluateTextConfig, corpus: Artifact, seed: int) -> None:
    """StepError for references that a metric can't be computed with, before any model runs."""
    if not cfg.metrics or _is_plain(corpus, cfg.split):
        return
    references = [each.references for each in _examples(cfg, corpus, cfg.examples, seed)]
    for name in cfg.metrics:
        try:
            quality.check_references(name, references)
        except ValueError as error:
            raise _not_computed(name, error) from error


def _not_computed(name: str, error: ValueError) -> StepError:
    return StepError(f"the metric {name} can't be computed: {error}")


def _losses(
    cfg: EvaluateTextConfig,
    tokens: Artifact,
    folders: Mapping[str, Path],
    speech: bool,
    out: Output,
) -> dict[str, dict[str, Additive]]:
    """Perplexity, bits per character and entropy of every model."""
    from goldcrest.kernels.metrics.additive import ratio
    from goldcrest.kernels.metrics.perplexity import bits_per, perplexity

    path, readers = rows_file(tokens, cfg.split), list(folders)
    rows = _some(len(open_rows(path, "speech" if speech else "")), cfg.loss_rows, [out.seed, 1])
    if len(rows) == 0:
        raise StepError(
            f"the split '{cfg.split}' has no token row to measure perplexity on",
            hint="choose another split, or hold out a larger share of the corpus",
        )
    shards = [
        quality.LossShard(folders[name], path, part, cfg.batch_rows, _device(out))
        for name in readers
        for part in _parts(rows, cfg.shard_rows)
    ]
    out.progress(None, f"perplexity of {len(readers)} models on {len(rows)} rows")
    done = list(
        out.runtime.map(quality.row_losses, shards, gpus=out.runtime.gpus, note="perplexity")
    )
    sums = dict(zip(readers, np.concatenate(done).reshape(len(readers), -1, 5), strict=True))
    out.table("losses", _loss_table(sums, rows))
    return {
        name: {
            "perplexity": perplexity(each[:, 0], each[:, 2]),
            "bits_per_char": bits_per(each[:, 0], each[:, 3]),
            "bits_per_byte": bits_per(each[:, 0], each[:, 4]),
            "entropy": ratio(each[:, 1], each[:, 2]),
        }
        for name, each in sums.items()
    }


def _loss_table(sums: Mapping[str, np.ndarray], rows: np.ndarray) -> pa.Table:
    names = [name for name in sums for _ in rows]
    values = np.concatenate(list(sums.values()))
    columns: dict[str, Any] = {"model": names, "row": np.tile(rows, len(sums))}
    columns.update({"nll": values[:, 0], "entropy": values[:, 1]})
    for place, unit in enumerate(("tokens", "characters", "bytes"), start=2):
        columns[unit] = values[:, place].astype(np.int64)
    return pa.table(columns)


def _answers(
    cfg: EvaluateTextConfig,
    corpus: Artifact,
    tokens: Artifact,
    folders: Mapping[str, Path],
    facts: Mapping[str, Mapping[str, Any]],
    out: Output,
) -> dict[str, dict[str, Additive]]:
    """Task metrics of every model that writes text."""
    writers = [name for name in folders if facts[name]["family"] in (*WRITERS, "speech")]
    hears = bool(writers) and facts[writers[0]]["family"] == "speech"
    if cfg.metrics and not hears and _is_plain(corpus, cfg.split):
        left_out = ", ".join(cfg.metrics)
        out.progress(None, f"plain text has no answers to compare with: {left_out} left out")
        cfg = cfg.model_copy(update={"metrics": ()})
    wanted = cfg.examples if cfg.metrics else cfg.shown
    if not writers or wanted == 0:
        return {}
    how = (cfg.generation, cfg.batch_prompts, _device(out))
    answer: Callable[[Any], Sequence[str | None]]
    shards: list[Any]
    if hears:
        path, places, examples = _utterances(cfg, corpus, tokens, wanted, out.seed)
        prompts, parts = [""] * len(examples), _parts(places, cfg.shard_rows)
        answer = quality.transcripts
        shards = [
            quality.SpeechShard(folders[name], path, part, *how)
            for name in writers
            for part in parts
        ]
    else:
        examples = _examples(cfg, corpus, wanted, out.seed)
        prompts = [quality.prompt_of(each) for each in examples]
        parts, answer = _parts(prompts, cfg.shard_rows), quality.answers
        shards = [
            quality.AnswerShard(folders[name], tuple(part), *how, bos=tokens.json("facts")["bos"])
            for name in writers
            for part in parts
        ]
    out.progress(None, f"answers of {len(writers)} models to {len(prompts)} prompts")
    done = out.runtime.map(answer, shards, gpus=out.runtime.gpus, note="answers")
    texts = [text for part in done for text in part]
    by_model = _by_model(writers, texts, out)
    out.table("answers", _answer_table(by_model, examples, prompts, cfg.shown))
    score = functools.partial(
        _score, examples=examples, metrics=cfg.metrics, plain_speech=cfg.plain_speech
    )
    scored = out.runtime.map(score, list(by_model.values()), note="metrics")
    return dict(zip(writers, scored, strict=True))


def _by_model(
    writers: Sequence[str], texts: Sequence[str | None], out: Output
) -> dict[str, list[str]]:
    """Answers by model. What it could not read has the answer "", and is counted."""
    each = len(texts) // len(writers)
    found: dict[str, list[str]] = {}
    for place, name in enumerate(writers):
        given = texts[place * each : (place + 1) * each]
        missing = given.count(None)
        out.metrics(language={name: {"unanswered": missing}})
        if missing:
            said = f"{missing} of {each} prompts: too long for it, or without any token"
            out.progress(None, f"{name} can't read {said}")
        found[name] = [text or "" for text in given]
    return found


def _is_plain(corpus: Artifact, split: Split) -> bool:
    """Whether a split has rows, and none of them a prompt: text to go on with."""
    prompted = (bool(each.prompt) for each in read_examples(corpus, split))
    return next(prompted, None) is False and not any(prompted)


def _examples(
    cfg: EvaluateTextConfig, corpus: Artifact, wanted: int | None, seed: int
) -> list[Example]:
    """Examples that are answered; for a metric only those with a prompt and references."""
    known = [
        each
        for each in read_examples(corpus, cfg.split)
        if not cfg.metrics or (each.prompt and each.references)
    ]
    if cfg.metrics and not known:
        raise StepError(
            f"the split '{cfg.split}' has no prompt with an answer, which "
            f"{', '.join(cfg.metrics)} would be computed on",
            hint="leave `metrics` empty for plain text, or give the corpus prompts and answers",
        )
    return [known[place] for place in _some(len(known), wanted, [seed, 2])]


def _utterances(
    cfg: EvaluateTextConfig, corpus: Artifact, tokens: Artifact, wanted: int | None, seed: int
) -> tuple[Path, np.ndarray, list[Example]]:
    """Speech that is written down: the token file, places in it (n,), and their examples."""
    path = rows_file(tokens, cfg.split)
    reader = open_rows(path, "speech")
    places = _some(len(reader), wanted, [seed, 2])
    numbers = set(reader.examples[places].tolist())
    chosen = {
        number: example
        for number, example in enumerate(read_examples(corpus, cfg.split))
        if number in numbers
    }
    return path, places, [chosen[int(number)] for number in reader.examples[places]]


def _score(
    texts: Sequence[str],
    *,
    examples: Sequence[Example],
    metrics: Sequence[str],
    plain_speech: bool,
) -> dict[str, Additive]:
    """Task metrics of one model's answers."""
    from goldcrest.kernels.metrics.transcription import plain_words

    references = [list(each.references) for each in examples]
    found = {}
    for name in metrics:
        given: Sequence[str] = texts
        known = references
        if plain_speech and name in quality.SPEECH_METRICS:
            given = [plain_words(text) for text in texts]
            known = [[plain_words(text) for text in each] for each in references]
        try:
            found[name] = quality.text_metric(name)(given, known)
        except ValueError as error:
            raise _not_computed(name, error) from error
    return found


def _answer_table(
    by_model: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    prompts: Sequence[str],
    shown: int,
) -> pa.Table:
    """The first answers of every model, those to one prompt beside each other."""
    rows = [
        {
            "model": name,
            "id": example.id,
            "prompt": prompt,
            "answer": texts[place],
            "references": list(example.references) or [example.answer],
        }
        for place, (example, prompt) in enumerate(zip(examples[:shown], prompts, strict=False))
        for name, texts in by_model.items()
    ]
    texts = {name: pa.string() for name in ("model", "id", "prompt", "answer")}
    return pa.Table.from_pylist(
        rows, schema=pa.schema({**texts, "references": pa.list_(pa.string())})
    )


def _report(
    cfg: EvaluateTextConfig, found: Mapping[str, Mapping[str, Additive]], out: Output
) -> dict[str, dict[str, Any]]:
    """Values and intervals of every model, and their differences to the dense one."""
    work = [
        (metrics, found["dense"] if "dense" in found and name != "dense" else {})
        for name, metrics in found.items()
    ]
    describe = functools.partial(_describe, replicates=cfg.bootstrap, seed=out.seed)
    described = list(out.runtime.map(describe, work, note="intervals"))
    language = dict(zip(found, (values for values, _ in described), strict=True))
    differences = dict(zip(found, (others for _, others in described), strict=True))
    out.metrics(
        language=language,
        language_minus_dense={name: values for name, values in differences.items() if values},
    )
    return language


def _describe(
    work: tuple[Mapping[str, Additive], Mapping[str, Additive]], *, replicates: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of one model: metrics with intervals, and differences to another's with intervals."""
    from goldcrest.kernels.metrics.additive import bootstrap_difference, bootstrap_interval

    metrics, others = work
    drawn = {"replicates": replicates, "seed": seed}
    values: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for name, metric in metrics.items():
        values[name] = metric.value
        values[f"{name}_ci"] = list(bootstrap_interval(metric, **drawn))
        if name in others:
            differences[name] = metric.value - others[name].value
            interval = bootstrap_difference(metric, others[name], **drawn)
            differences[f"{name}_ci"] = list(interval)
        unit = "rows" if name in quality.ON_TOKENS else "examples"
        values[unit] = len(metric.statistics)
    return values, differences


def _sizes(
    folders: Mapping[str, Path], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Bytes to serve a bundle, its weights, the zeros and bits of them."""
    return {
        name: {
            "bytes": bundle_bytes(folder),
            "weight_bytes": (folder / "model.safetensors").stat().st_size,
            **{key: facts[name][key] for key in ("parameters", "sparsity", "bits")},
        }
        for name, folder in folders.items()
    }


def _figures(
    language: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, Any]], out: Output
) -> None:
    from goldcrest.tasks.language import evaluation_figures as figures

    shown = figures.shown_metrics(language)
    if not shown:
        return
    out.figure("quality_by_sparsity", figures.by_sparsity(language, sizes, shown))
    out.figure("quality_by_size", figures.by_size(language, sizes, shown))


def _measure_speed(config: SpeedConfig, folders: Mapping[str, Path], out: Output) -> None:
    """One model after the other, in one place: side by side they would slow each other down."""
    work = functools.partial(_time_all, config=config, device=_device(out))
    times = out.runtime.map(
        work, [dict(folders)], cpus=config.threads, gpus=out.runtime.gpus, note="latency"
    )
    (measured,) = times
    out.measure(models=measured)


def _time_all(
    folders: Mapping[str, Path], *, config: SpeedConfig, device: str
) -> dict[str, dict[str, float]]:
    return {name: measure_speed(path, config, device=device) for name, path in folders.items()}


def _some(count: int, wanted: int | None, seed: Sequence[int]) -> np.ndarray:
    """Places of at most `wanted` of `count` things, drawn without replacement, in order."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(list(seed)).choice(count, wanted, replace=False))


def _parts(items: Any, size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _device(out: Output) -> str:
    return "cuda" if out.runtime.gpus else "cpu"

"""Evaluate: verification on speakers that no step trained on, and size and speed of each bundle.

Systems: `meanstd` (plain vector), `ivector` (no network), the bundles `dense`, `sparse`, `int8`,
and `fusion` (mean of the z-normalised scores of i-vector and dense). The networks' scores are
AS-normed against a cohort of training utterances where the config gives one (`eer_cosine` is then
the plain cosine's). EERs are percent, by linear interpolation, with bootstrap intervals over
speakers. Trials among the training speakers ("seen") are apart, under `verification_seen`.

Artifact, for each of the two sections: scores_SECTION (one row per trial), calibration_SECTION
(thresholds of the plain cosines), the figures det_SECTION and scores_SECTION.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from goldcrest.cluster.api import (
    Artifact,
    Config,
    DoesNotChangeResult,
    InputFiles,
    Output,
    task,
)
from goldcrest.tasks.data import audio
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.speaker.embed import embed_rows
from goldcrest.tasks.speaker.trials import TrialSet, drawn_trials, given_trials
from goldcrest.tasks.speaker.vectors import facts_by_id

COSTS = (0.01, 0.05)  # target priors of the reported minDCF
NEAREST = 0.03  # share of the cohort: more reaches into other channels and languages
FALSE_ACCEPT_RATES = (0.1, 0.05, 0.01)  # whose thresholds are written down


class EvaluateConfig(Config):
    """Trials, intervals and timing."""

    trials: Annotated[str | None, InputFiles] = Field(
        None,
        description="trial list, lines `label utterance utterance` (1: same speaker; see "
        "tasks/speaker/trials.py); None: drawn from labels",
    )
    max_targets: int = Field(4_000, ge=1, description="target trials per corpus at most")
    max_nontargets: int = Field(4_000, ge=1, description="non-target trials per corpus at most")
    bootstrap: int = Field(500, ge=10, description="replicates of the confidence intervals")
    fusion_weight: float = Field(
        0.5, ge=0, le=1, description="weight of the dense network beside the i-vector"
    )
    cohort: int = Field(
        0, ge=0, description="training utterances that AS-norm compares with; 0: plain cosine"
    )
    cohort_top: Annotated[int, Field(ge=2)] | None = Field(
        None, description="nearest of them that AS-norm looks at; None: 3 %, at least 20"
    )
    timed_utterances: int = Field(40, ge=1, description="utterances that latency is measured on")
    shard_utterances: Annotated[int, DoesNotChangeResult] = Field(
        500, ge=1, description="utterances per piece of work"
    )


@task(cpus=0, timeout="12h")
def evaluate(
    cfg: EvaluateConfig,
    corpus: Artifact,
    features: Artifact,
    ivectors: Artifact,
    dense: Artifact,
    sparse: Artifact | None,
    int8: Artifact | None,
    out: Output,
) -> None:
    """Score the trials with every system; measure every bundle."""
    bundles = {"dense": dense, "sparse": sparse, "int8": int8}
    present = {name: artifact for name, artifact in bundles.items() if artifact is not None}
    for artifact in present.values():
        for member in ("bundle.json", "model.safetensors"):
            artifact.file(member)
    for split, section in (("eval", "verification"), ("train", "verification_seen")):
        trials = _trials(cfg, corpus, split, out)
        if trials is None:
            out.metrics(**{section: {}})
            continue
        out.progress(None, f"{len(trials.target)} {split} trials")
        scores, plain = _score(cfg, trials, features, ivectors, present, out)
        _report(cfg, section, trials, scores, plain, corpus, out)
    _measure_bundles(cfg, corpus, present, out)


def _trials(cfg: EvaluateConfig, corpus: Artifact, split: str, out: Output) -> TrialSet | None:
    if cfg.trials is not None:
        return given_trials(Path(cfg.trials), corpus, out) if split == "eval" else None
    limits = {"max_targets": cfg.max_targets, "max_nontargets": cfg.max_nontargets}
    return drawn_trials(corpus, split, **limits, out=out)


def _score(
    cfg: EvaluateConfig,
    trials: TrialSet,
    features: Artifact,
    ivectors: Artifact,
    bundles: Mapping[str, Artifact],
    out: Output,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores (K,) of every system, higher for the same speaker, and the AS-normed ones' cosines."""
    from goldcrest.kernels.speaker import asnorm, scoring

    def cosine(matrix: np.ndarray) -> np.ndarray:
        """Cosines (K,) of the vectors (M, D) of the recordings."""
        return scoring.cosine_scores(matrix, trials.first, trials.second)

    utterances = trials.utterances
    scores = {
        "meanstd": cosine(trials.pool(_lookup(ivectors, "baseline", "meanstd", utterances))),
        "ivector": cosine(trials.pool(_lookup(ivectors, "vectors", "vector", utterances))),
    }
    plain: dict[str, np.ndarray] = {}
    reader = FrameReader(features.file("fbank.arrow"))
    rows = reader.rows()
    wanted = np.array([rows[name] for name in utterances])
    cohort = _cohort(features, reader, cfg.cohort, set(utterances), out.seed)
    for name, artifact in bundles.items():
        vectors = _embed(cfg, artifact, reader, np.concatenate([wanted, cohort]), name, out)
        tested = trials.pool(vectors[: len(wanted)])
        scores[name] = cosine(tested)
        if len(cohort) > 1:
            plain[name] = scores[name]
            scores[name] = asnorm.asnorm_scores(
                tested,
                vectors[len(wanted) :],
                trials.first,
                trials.second,
                asnorm.Settings(top=cfg.cohort_top or max(20, round(NEAREST * len(cohort)))),
            )
    weights = [1.0 - cfg.fusion_weight, cfg.fusion_weight]
    scores["fusion"] = scoring.fuse([scores["ivector"], scores["dense"]], weights)
    return scores, plain


def _cohort(
    features: Artifact, reader: FrameReader, count: int, tested: set[str], seed: int
) -> np.ndarray:
    """Rows of a seeded sample of clean training utterances; none where they are the trials."""
    splits = np.array(features.table("index", ["split"])["split"].to_pylist())
    train = np.flatnonzero((splits == "train") & (reader.copies == 0))
    if any(reader.ids[int(row)] in tested for row in train):
        return np.zeros(0, np.int64)  # seen trials: a cohort is of other speakers
    return np.random.default_rng([seed, 9]).permutation(train)[:count]


def _embed(
    cfg: EvaluateConfig,
    bundle: Artifact,
    reader: FrameReader,
    rows: np.ndarray,
    name: str,
    out: Output,
) -> np.ndarray:
    """(len(rows), E) embeddings by a bundle, shards of rows in parallel."""
    size = cfg.shard_utterances
    ranges = [rows[start : start + size] for start in range(0, len(rows), size)]
    work = functools.partial(embed_rows, folder=bundle.path, reader=reader)
    return np.concatenate(list(out.runtime.map(work, ranges, note=f"embed {name}")))


def _lookup(artifact: Artifact, table: str, column: str, ids: list[str]) -> np.ndarray:
    """(N, D) vectors of clean utterances, zero where the table does not know the id."""
    names = artifact.table(table, ["id"] if table == "baseline" else ["id", "copy"])
    matrix = artifact.matrix(table, column)
    copies = names["copy"].to_numpy() if "copy" in names.column_names else np.zeros(len(matrix))
    place = {
        name: row
        for row, (name, copy) in enumerate(zip(names["id"].to_pylist(), copies, strict=True))
        if copy == 0
    }
    found = np.zeros((len(ids), matrix.shape[1]), matrix.dtype)
    for number, name in enumerate(ids):
        if name in place:
            found[number] = matrix[place[name]]
    return found


def _report(
    cfg: EvaluateConfig,
    section: str,
    trials: TrialSet,
    scores: Mapping[str, np.ndarray],
    plain: Mapping[str, np.ndarray],
    corpus: Artifact,
    out: Output,
) -> None:
    from goldcrest.kernels.metrics import verification as metrics

    speaker_of = facts_by_id(corpus, "speaker")
    names = np.array([speaker_of.get(parts[0]) or parts[0] for parts in trials.segments])
    speakers = (names[trials.first], names[trials.second])
    measure = functools.partial(
        system_metrics, trials=trials, speakers=speakers, replicates=cfg.bootstrap, seed=out.seed
    )
    systems = list(scores)
    figures = out.runtime.map(measure, [scores[name] for name in systems], note="error rates")
    found: dict[str, Any] = dict(zip(systems, figures, strict=True))
    for system, values in plain.items():
        found[system]["eer_cosine"] = 100.0 * metrics.equal_error_rate(values, trials.target)
    cosines = {name: plain.get(name, values) for name, values in scores.items() if name != "fusion"}
    calibration = {name: calibrate(values, trials.target) for name, values in cosines.items()}
    out.metrics(**{section: found})
    out.json(f"calibration_{section}", calibration)
    columns: dict[str, Any] = {
        "first": [trials.names[int(place)] for place in trials.first],
        "second": [trials.names[int(place)] for place in trials.second],
        "target": pa.array(trials.target),
        "corpus": trials.corpus.tolist(),
    }
    columns.update(scores)
    columns.update({f"{name}_cosine": values for name, values in plain.items()})
    out.table(f"scores_{section}", columns)
    out.figure(f"det_{section}", det_figure(scores, trials.target))
    out.figure(f"scores_{section}", score_figure(scores, trials.target))


def system_metrics(
    scores: np.ndarray,
    *,
    trials: TrialSet,
    speakers: tuple[np.ndarray, np.ndarray],
    replicates: int,
    seed: int,
) -> dict[str, Any]:
    """EER (%) with its interval and by corpus, and minDCF, of scores (K,) of the trials.

    `speakers` are the speakers of the first and second sides, (K,) each, for the bootstrap.
    """
    from goldcrest.kernels.metrics import verification as metrics

    target = trials.target
    interval = metrics.bootstrap_eer(scores, target, speakers, replicates=replicates, seed=seed)
    by_corpus = {}
    for name in np.unique(trials.corpus):
        here = trials.corpus == name
        if len(np.unique(target[here])) == 2:
            by_corpus[str(name)] = 100.0 * metrics.equal_error_rate(scores[here], target[here])
    return {
        "eer": 100.0 * metrics.equal_error_rate(scores, target),
        "eer_ci": [100.0 * interval.low, 100.0 * interval.high],
        **{f"min_dcf_{prior}": metrics.min_dcf(scores, target, prior) for prior in COSTS},
        "trials": len(scores),
        **({"eer_by_corpus": by_corpus} if len(by_corpus) > 1 else {}),
    }


def calibrate(scores: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """What a server needs to know of plain scores (K,): thresholds, and their histogram.

    Thresholds are those of the equal error rate and of chosen false-accept rates.
    """
    from goldcrest.kernels.metrics.verification import det_curve, equal_error_rate

    curve = det_curve(scores, target)
    finite = np.isfinite(curve.thresholds)
    values, far = curve.thresholds[finite], curve.far[finite]
    equal = int(np.argmin(np.abs(curve.frr[finite] - far)))
    chosen = {"eer": float(values[equal])}
    for rate in FALSE_ACCEPT_RATES:
        allowed = np.flatnonzero(far <= rate)
        chosen[f"far_{rate}"] = float(values[allowed[0]] if len(allowed) else values[-1])
    edges = np.linspace(float(scores.min()) - 1e-6, float(scores.max()) + 1e-6, 51)
    return {
        "score": "cosine",
        "eer": 100.0 * equal_error_rate(scores, target),
        "trials": len(scores),
        "thresholds": chosen,
        "histogram": {
            "edges": edges.tolist(),
            "target": np.histogram(scores[target], edges)[0].tolist(),
            "nontarget": np.histogram(scores[~target], edges)[0].tolist(),
        },
    }


def det_figure(scores: Mapping[str, np.ndarray], target: np.ndarray) -> Any:
    """DET curves on normal-deviate axes, one line per system."""
    from matplotlib.figure import Figure
    from scipy.special import ndtri

    from goldcrest.kernels.metrics.verification import det_curve

    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    for name, values in scores.items():
        curve = det_curve(values, target)
        inside = (curve.far > 0) & (curve.far < 1) & (curve.frr > 0) & (curve.frr < 1)
        axes.plot(ndtri(curve.far[inside]), ndtri(curve.frr[inside]), label=name, linewidth=1.2)
    ticks = np.array([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
    axes.set_xticks(ndtri(ticks), [f"{100 * t:g}" for t in ticks])
    axes.set_yticks(ndtri(ticks), [f"{100 * t:g}" for t in ticks])
    axes.set(xlabel="false accept (%)", ylabel="false reject (%)", title="DET")
    axes.set_xlim(*ndtri([0.003, 0.6]))
    axes.set_ylim(*ndtri([0.003, 0.6]))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")
    return figure


def score_figure(scores: Mapping[str, np.ndarray], target: np.ndarray) -> Any:
    """Histograms of target and non-target scores, one panel per system."""
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(9, 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(scores) :]:
        axis.remove()
    for axis, (name, values) in zip(axes.flat, scores.items(), strict=False):
        bins = np.linspace(values.min() - 1e-6, values.max() + 1e-6, 50)
        axis.hist(values[~target], bins=bins, alpha=0.6, density=True, label="non-target")
        axis.hist(values[target], bins=bins, alpha=0.6, density=True, label="target")
        axis.set_title(name, fontsize="small")
        axis.tick_params(labelsize="x-small")
    axes.flat[0].legend(loc="upper left", fontsize="x-small")
    figure.tight_layout()
    return figure


def _measure_bundles(
    cfg: EvaluateConfig, corpus: Artifact, bundles: Mapping[str, Artifact], out: Output
) -> None:
    """Size (facts) and speed on one thread (measurements), from waveform to embedding."""
    from goldcrest.tasks.speaker.bundle import bundle_bytes, read_description

    for name, artifact in bundles.items():
        facts = read_description(artifact.path)
        sizes = {key: facts[key] for key in ("parameters", "sparsity")}
        out.metrics(models={name: {"bytes": bundle_bytes(artifact.path), **sizes}})
    folders = {name: artifact.path for name, artifact in bundles.items()}
    waveforms = _some_waveforms(corpus, cfg.timed_utterances)
    time_all = functools.partial(time_bundles, waveforms=waveforms)
    (times,) = out.runtime.map(time_all, [folders], note="latency")
    out.measure(models=times)


def time_bundles(
    folders: Mapping[str, Path], *, waveforms: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Real-time factor and median milliseconds per utterance of each bundle, on one thread."""
    import torch

    from goldcrest.tasks.speaker.bundle import load_bundle

    models = {name: load_bundle(folder) for name, folder in folders.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {name: [] for name in models}
    try:
        for turn, waveform in enumerate([waveforms[0], *waveforms]):
            for name, model in models.items():  # in turn, so that all share the machine's moods
                start = time.perf_counter()
                model.embed_waveform(waveform)
                if turn > 0:  # the first one warms up
                    spent[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    seconds = sum(len(waveform) for waveform in waveforms) / audio.SAMPLE_RATE
    return {
        name: {
            "rtf": sum(times) / seconds,
            "latency_ms_p50": 1000 * statistics.median(times),
        }
        for name, times in spent.items()
    }


def _some_waveforms(corpus: Artifact, count: int) -> list[np.ndarray]:
    """The first `count` waveforms of the corpus, evaluation speakers first where there are any."""
    kept: dict[str, list[bytes]] = {"eval": [], "train": []}
    for shard in corpus.shards("utterances"):
        table = pq.read_table(shard, columns=["split", "audio"])
        for split, found in kept.items():
            part = table.filter(pc.equal(table["split"], split))["audio"]
            found += part.slice(0, count - len(found)).to_pylist()
        if len(kept["eval"]) >= count:
            break
    return [audio.from_pcm16(data) for data in (kept["eval"] + kept["train"])[:count]]

"""i-vectors: MFCC -> UBM -> total variability -> one vector per utterance, without any label.

Everything is estimated on the clean training utterances. Statistics are accumulated by workers over
shards of utterances and merged; the Baum-Welch statistics of a shard stay in a file beside the
step, so that neither frames nor statistics need to fit into memory. Where the cluster profile gives
the step's workers a GPU, they accumulate and extract on it.

Artifact:
    vectors      id, copy, split, vector (length-normalised i-vectors)
    baseline     id, meanstd (mean and standard deviation of the MFCC: what i-vectors must beat)
    extractor    UBM, total-variability model and whitening (safetensors)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.methods import SettingsOf, settings_of

if TYPE_CHECKING:
    import torch

    from goldcrest.kernels.ivector.statistics import BaumWelch

_IVECTOR = "goldcrest.kernels.ivector"
_SETTINGS = dict[str, Any]


class IvectorConfig(Config):
    """The i-vector extractor (speaker study, chapter 10; Kaldi's VoxCeleb recipe)."""

    covariance: Literal["diagonal", "full"] = Field("full", description="covariances of the UBM")
    diagonal: Annotated[
        _SETTINGS, SettingsOf(f"{_IVECTOR}.diagonal_gmm", "DiagonalGmmSettings")
    ] = Field({}, description="diagonal UBM: number of Gaussians, EM iterations, floors")
    full: Annotated[_SETTINGS, SettingsOf(f"{_IVECTOR}.full_gmm", "FullGmmSettings")] = Field(
        {}, description="full-covariance UBM, used when covariance is full"
    )
    ubm_frames: int = Field(500_000, ge=1, description="frames of the in-memory EM of the UBM")
    ubm_passes: int = Field(
        4, ge=0, description="EM passes of the diagonal UBM over all shards after that"
    )
    ubm_frame_step: int = Field(
        1, ge=1, description="every n-th frame takes part in the passes over all shards"
    )
    ubm_selected: int | None = Field(
        None,
        ge=1,
        description="Gaussians that share a frame in those passes of the diagonal UBM; None: all",
    )
    extractor_utterances: int | None = Field(
        None,
        ge=2,
        description="longest training utterances that train the total-variability model; None: all",
    )
    statistics: Annotated[_SETTINGS, SettingsOf(f"{_IVECTOR}.statistics", "StatisticsSettings")] = (
        Field({}, description="posteriors: Gaussians per frame, pruning, scale of the counts")
    )
    model: Annotated[
        _SETTINGS, SettingsOf(f"{_IVECTOR}.total_variability", "TotalVariabilitySettings")
    ] = Field({}, description="total-variability model: dimensions, EM iterations, formulation")
    whitening: float | None = Field(
        None, ge=0, le=1, description="centre and whiten with this strength; None: neither"
    )
    shard_utterances: int = Field(2_000, ge=1, description="utterances per shard of statistics")


@task(cpus=0, timeout="24h")
def ivector(cfg: IvectorConfig, features: Artifact, out: Output) -> None:
    """Train the extractor on the training utterances and extract all utterances and copies."""
    reader = FrameReader(features.file("mfcc.arrow"))
    index = features.table("index")
    splits = np.array(index.column("split").to_pylist())
    train = np.flatnonzero((splits == "train") & (reader.copies == 0))
    if len(train) < 2:
        raise StepError(f"i-vectors need two training utterances or more, there are {len(train)}")
    fan_out = functools.partial(out.runtime.map, gpus=out.runtime.gpus)
    ubm = _train_ubm(cfg, reader, train, out, fan_out)
    chosen = longest(reader, train, cfg.extractor_utterances)
    shards = _write_statistics(cfg, reader, chosen, ubm, out, fan_out)
    model = _train_model(cfg, ubm, shards, out, fan_out)
    vectors = _extract_all(cfg, reader, ubm, model, out, fan_out)
    finished, transform = _normalise(cfg, vectors, train)
    _write(reader, index, finished, out)
    tensors = {f"ubm.{name}": value for name, value in ubm.to_tensors().items()}
    tensors |= {f"model.{name}": value for name, value in model.to_tensors().items()}
    out.tensors("extractor", tensors | {f"whitening.{n}": v for n, v in transform.items()})


FanOut = Callable[..., Iterable[Any]]


def _device(out: Output) -> str:
    """Where the workers compute."""
    return "cuda" if out.runtime.gpus else "cpu"


def _train_ubm(
    cfg: IvectorConfig, reader: FrameReader, train: np.ndarray, out: Output, fan_out: FanOut
) -> Any:
    """Diagonal UBM in memory on a sample of frames, then EM over shards, then full covariances."""
    from goldcrest.kernels.ivector import diagonal_gmm, full_gmm
    from goldcrest.kernels.ivector.records import merge_all

    settings = settings_of(f"{_IVECTOR}.diagonal_gmm", "DiagonalGmmSettings", cfg.diagonal)
    first = functools.partial(
        _diagonal_of_sample,
        reader=reader,
        settings=settings,
        count=cfg.ubm_frames,
        seed=out.seed,
        device=_device(out),
    )
    ((gmm, history),) = fan_out(first, [train], note="UBM of a sample")
    for value in history:
        out.log(ubm_log_likelihood=value)
    ranges = _ranges(train, cfg.shard_utterances)
    for number in range(cfg.ubm_passes):
        out.progress(0.1 + 0.1 * number / cfg.ubm_passes, f"UBM pass {number + 1}")
        work = functools.partial(
            _accumulate_diagonal, reader=reader, gmm=gmm, cfg=cfg, device=_device(out)
        )
        total = merge_all(fan_out(work, ranges, note="UBM"))
        gmm = diagonal_gmm.update(total, gmm, settings)
        out.log(ubm_log_likelihood=float(total.log_likelihood / total.frames))
    if cfg.covariance == "diagonal":
        return gmm
    full_settings = settings_of(f"{_IVECTOR}.full_gmm", "FullGmmSettings", cfg.full)
    full = full_gmm.from_diagonal(gmm)
    for number in range(full_settings.iterations):
        out.progress(0.2 + 0.2 * number / full_settings.iterations, f"full UBM pass {number + 1}")
        work = functools.partial(
            _accumulate_full,
            reader=reader,
            gmm=full,
            step=cfg.ubm_frame_step,
            settings=full_settings,
            device=_device(out),
        )
        total = merge_all(fan_out(work, ranges, note="UBM"))
        full = full_gmm.update(total, full, full_settings)
        out.log(ubm_log_likelihood=float(total.log_likelihood / total.frames))
    return full


def _diagonal_of_sample(
    rows: np.ndarray, *, reader: FrameReader, settings: Any, count: int, seed: int, device: str
) -> tuple[Any, list[float]]:
    """A diagonal GMM trained on a sample of frames, and its log-likelihood per iteration."""
    import torch

    from goldcrest.kernels.ivector import diagonal_gmm

    sample = _sample_frames(reader, rows, count, seed)
    if len(sample) < settings.gaussians:
        raise StepError(
            f"{len(sample)} speech frames are too few for {settings.gaussians} Gaussians",
            hint="lower ivector.diagonal.gaussians",
        )
    generator = torch.Generator().manual_seed(seed)
    gmm, history = diagonal_gmm.train(sample.to(device), settings, generator)
    return gmm.to("cpu"), history


def _sample_frames(reader: FrameReader, rows: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """About `count` frames (T, D) float32, an equal share of every utterance."""
    import torch

    share = min(1.0, count / max(1, int(reader.lengths[rows].sum())))
    rng = np.random.default_rng([seed, 6])
    kept = []
    for row in rows:
        frames = reader[int(row)]
        kept.append(frames if share == 1.0 else frames[rng.random(len(frames)) < share])
    return torch.from_numpy(np.concatenate(kept))


def _ranges(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _frames(reader: FrameReader, rows: Sequence[int] | np.ndarray) -> list[torch.Tensor]:
    import torch

    return [torch.from_numpy(reader[int(row)]) for row in rows]


def _accumulate_diagonal(
    rows: np.ndarray, *, reader: FrameReader, gmm: Any, cfg: IvectorConfig, device: str
) -> Any:
    from goldcrest.kernels.ivector import diagonal_gmm

    frames = _every_nth(reader, rows, cfg.ubm_frame_step).to(device)
    return diagonal_gmm.accumulate(frames, gmm.to(device), selected=cfg.ubm_selected).to("cpu")


def _accumulate_full(
    rows: np.ndarray, *, reader: FrameReader, gmm: Any, step: int, settings: Any, device: str
) -> Any:
    from goldcrest.kernels.ivector import full_gmm

    frames = _every_nth(reader, rows, step).to(device)
    return full_gmm.accumulate(frames, gmm.to(device), settings).to("cpu")


def _every_nth(reader: FrameReader, rows: np.ndarray, step: int) -> torch.Tensor:
    """Every `step`-th frame of each utterance, (T, D) float32."""
    import torch

    return torch.cat([frames[::step] for frames in _frames(reader, rows)])


def longest(reader: FrameReader, rows: np.ndarray, count: int | None) -> np.ndarray:
    """The `count` longest of the rows in their order; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    order = np.argsort(-reader.lengths[rows], kind="stable")
    return rows[np.sort(order[:count])]


def _statistics(
    cfg: IvectorConfig,
    reader: FrameReader,
    rows: np.ndarray,
    ubm: Any,
    device: str,
    *,
    second: bool,
) -> BaumWelch:
    """Baum-Welch statistics of the rows, on `device`."""
    from goldcrest.kernels.ivector import statistics

    given = cfg.statistics if second else {**cfg.statistics, "second_order": "none"}
    settings = settings_of(f"{_IVECTOR}.statistics", "StatisticsSettings", given)
    ubm = ubm.to(device)
    parts = []
    for part in _ranges(rows, 200):
        frames = [each.to(device) for each in _frames(reader, part)]
        parts.append(statistics.baum_welch(frames, ubm, settings))
    return statistics.concatenate(parts)


def _write_statistics(
    cfg: IvectorConfig,
    reader: FrameReader,
    train: np.ndarray,
    ubm: Any,
    out: Output,
    fan_out: FanOut,
) -> list[Path]:
    """Baum-Welch statistics of every shard in a file of its own, beside the step."""
    folder = out.scratch / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    out.progress(0.4, "statistics")
    jobs = [
        (rows, folder / f"shard-{number:05d}.safetensors")
        for number, rows in enumerate(_ranges(train, cfg.shard_utterances))
    ]
    work = functools.partial(_write_shard, cfg=cfg, reader=reader, ubm=ubm, device=_device(out))
    return list(fan_out(work, jobs, note="statistics"))


def _write_shard(
    job: tuple[np.ndarray, Path], *, cfg: IvectorConfig, reader: FrameReader, ubm: Any, device: str
) -> Path:
    from safetensors.torch import save_file

    rows, path = job
    found = _statistics(cfg, reader, rows, ubm, device, second=True).to("cpu").to_tensors()
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in found.items()}, temporary)
    return temporary.replace(path)


def _train_model(
    cfg: IvectorConfig, ubm: Any, shards: list[Path], out: Output, fan_out: FanOut
) -> Any:
    import torch

    from goldcrest.kernels.ivector import total_variability
    from goldcrest.kernels.ivector.records import merge_all

    settings = settings_of(f"{_IVECTOR}.total_variability", "TotalVariabilitySettings", cfg.model)
    generator = torch.Generator().manual_seed(out.seed)
    model = total_variability.initialise(ubm, settings, generator)
    for number in range(settings.iterations):
        out.progress(0.5 + 0.3 * number / settings.iterations, f"T-matrix pass {number + 1}")
        work = functools.partial(_e_step, model=model, device=_device(out))
        sums = merge_all(fan_out(work, shards, note="T-matrix"))
        frames = max(1e-10, float(sums.occupancy.sum()))
        out.log(total_variability_objective=total_variability.objective(sums, model) / frames)
        model = total_variability.update(sums, model, settings)
    return model


def _e_step(shard: Path, *, model: Any, device: str) -> Any:
    from safetensors.torch import load_file

    from goldcrest.kernels.ivector import total_variability
    from goldcrest.kernels.ivector.statistics import BaumWelch

    found = BaumWelch.from_tensors(load_file(shard)).to(device)
    return total_variability.e_step(found, model.to(device)).to("cpu")


def _extract_all(
    cfg: IvectorConfig, reader: FrameReader, ubm: Any, model: Any, out: Output, fan_out: FanOut
) -> np.ndarray:
    """(rows of the file, R) float64."""
    out.progress(0.8, "extraction")
    work = functools.partial(
        _extract_rows, cfg=cfg, reader=reader, ubm=ubm, model=model, device=_device(out)
    )
    ranges = _ranges(np.arange(len(reader)), cfg.shard_utterances)
    return np.concatenate(list(fan_out(work, ranges, note="extraction")))


def _extract_rows(
    rows: np.ndarray, *, cfg: IvectorConfig, reader: FrameReader, ubm: Any, model: Any, device: str
) -> np.ndarray:
    from goldcrest.kernels.ivector import total_variability

    found = _statistics(cfg, reader, rows, ubm, device, second=False)
    return total_variability.extract(found, model.to(device)).cpu().numpy()


def _normalise(
    cfg: IvectorConfig, vectors: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Whiten (fitted on the training utterances) and scale to unit length."""
    import torch

    from goldcrest.kernels.ivector import length_norm

    tensor = torch.from_numpy(vectors)
    transform: dict[str, torch.Tensor] = {}
    if cfg.whitening is not None:
        fitted = length_norm.fit_whitening(tensor[train], strength=cfg.whitening)
        tensor = length_norm.whiten(tensor, fitted)
        transform = fitted.to_tensors()
    return length_norm.length_normalise(tensor).numpy().astype(np.float32), transform


def _write(reader: FrameReader, index: pa.Table, vectors: np.ndarray, out: Output) -> None:
    clean = np.flatnonzero(reader.copies == 0)
    out.table("vectors", index.append_column("vector", list_column(vectors)))
    out.table(
        "baseline",
        {
            "id": [reader.ids[row] for row in clean],
            "meanstd": list_column(np.stack([_mean_std(reader[int(row)]) for row in clean])),
        },
    )
    out.metrics(ivector={"dimensions": vectors.shape[1], "utterances": len(clean)})


def _mean_std(frames: np.ndarray) -> np.ndarray:
    """(T, D) -> (2 D,): the plainest utterance vector there is."""
    return np.concatenate([frames.mean(0), frames.std(0)])


def list_column(matrix: np.ndarray) -> pa.FixedSizeListArray:
    """(N, D) float -> an Arrow column of N lists of D float32."""
    flat = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])

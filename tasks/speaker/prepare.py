"""Prepare: any folders of speech -> 16 kHz mono utterances in Parquet shards with a table of facts.

Every recording is read, checked, resampled and cut into segments; what can't be used goes to
quarantine with a reason. Where speakers are known and no evaluation corpora are given, a share of
the speakers of every corpus is kept for evaluation: no later step trains on anything of theirs.

Artifact:
    utterances/   id, corpus, speaker, sex, text, split, seconds, speech, audio (16-bit PCM)
    facts         the same without the audio
    quarantine    id, path, reason
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from goldcrest.cluster.api import Config, InputError, InputFiles, Output, StepError, task
from goldcrest.tasks.data import audio, synthetic
from goldcrest.tasks.data.corpus import (
    Layout,
    Recording,
    as_text,
    corpus_names,
    manifest_folders,
    read_corpora,
    refuse_shared_audio,
)
from goldcrest.tasks.data.recording_chunks import chunks
from goldcrest.tasks.methods import SettingsOf, settings_of

Split = Literal["train", "eval"]
_FRONTEND = "goldcrest.kernels.frontend"

FACTS = pa.schema(
    [
        ("id", pa.string()),
        ("corpus", pa.string()),
        ("speaker", pa.string()),
        ("sex", pa.string()),
        ("text", pa.string()),
        ("split", pa.string()),
        ("seconds", pa.float64()),
        ("speech", pa.float64()),
    ]
)
UTTERANCES = FACTS.append(pa.field("audio", pa.binary()))
QUARANTINE = pa.schema([("id", pa.string()), ("path", pa.string()), ("reason", pa.string())])


class EmbeddedConfig(Config):
    """The corpus that Goldcrest makes itself with espeak-ng when no `paths` are given."""

    speakers: int = Field(24, ge=4, description="distinct synthetic speakers")
    utterances: int = Field(10, ge=2, description="utterances per speaker, about 3 s each")


class PrepareConfig(Config):
    """Which speech is read and how it is cut."""

    paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (),
        description="corpora: folders, manifests or datasets://NAME; none: the embedded one",
    )
    eval_paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (),
        description="corpora for evaluation only; none: speakers held out of `paths`; names of "
        "speakers that are in `paths` too are noted in the metrics: they may be the same people",
    )
    names: tuple[str, ...] = Field(
        (), description="names of the corpora in ids and results; none: those of their folders"
    )
    beside: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="folders of corpora that are given as manifest files (filled in)"
    )
    layout: Layout = Field("auto", description="how folders are read; auto: found by looking")
    embedded: EmbeddedConfig = Field(EmbeddedConfig(), description="the corpus made on the spot")
    segment_seconds: float = Field(
        4.0, gt=0, description="longer recordings are cut into equal pieces of at most this (s)"
    )
    min_seconds: float = Field(0.15, gt=0, description="shorter recordings are quarantined (s)")
    eval_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="share of each corpus's labelled speakers held out; a name that is in several "
        "corpora is on one side in all of them",
    )
    vad: Annotated[dict[str, Any], SettingsOf(f"{_FRONTEND}.vad", "VadSettings")] = Field(
        {}, description="energy voice activity detection; no speech at all: quarantined"
    )
    max_bad_share: float = Field(
        0.2, ge=0, le=1, description="share of recordings that may be quarantined before it fails"
    )

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Names and audio folders belong to the result, so they must be in the key."""
        paths = (*self.paths, *self.eval_paths)
        if self.names and len(self.names) != len(paths):
            raise ValueError(f"{len(self.names)} names for {len(paths)} corpora")
        object.__setattr__(self, "names", self.names or corpus_names(paths))
        object.__setattr__(self, "beside", manifest_folders(paths))
        return self


@dataclass(frozen=True)
class _Job:
    """One piece of work for one worker: recordings of a split, or synthetic speakers."""

    recordings: Sequence[Recording] = ()
    splits: Sequence[Split] = ()
    voices: Sequence[synthetic.Voice] = ()


@task(cpus=0, retry_on=(OSError,), timeout="12h", version=2)
def prepare(cfg: PrepareConfig, out: Output) -> None:
    """Read, check, resample, cut and split the corpora (see the module docstring)."""
    jobs, expected = (_corpus_jobs if cfg.paths else _embedded_jobs)(cfg, out.seed)
    work = functools.partial(_run_job, cfg=cfg, seed=out.seed)
    facts: list[pa.Table] = []
    quarantined: list[dict[str, str]] = []
    total = 0
    with out.shards("utterances") as shards:
        for rows, bad, recordings in out.runtime.map(work, jobs, note="read"):
            shards.write(rows)
            facts.append(rows.select(FACTS.names))
            quarantined.extend(bad)
            total += recordings
            out.progress(total / expected, f"{total} recordings, {len(quarantined)} bad")
    table = pa.concat_tables(facts)
    _check_shares(table, quarantined, total, cfg)
    out.table("facts", table)
    out.table("quarantine", pa.Table.from_pylist(quarantined, schema=QUARANTINE))
    _report(table, len(quarantined), out)


def _corpus_jobs(cfg: PrepareConfig, seed: int) -> tuple[Iterator[_Job], int]:
    """The jobs, made one after the other as they are taken, and the number of recordings."""
    recordings = read_corpora((*cfg.paths, *cfg.eval_paths), cfg.layout, cfg.names)
    if cfg.eval_paths:
        training = set(cfg.names[: len(cfg.paths)])
        splits: list[Split] = ["train" if r.corpus in training else "eval" for r in recordings]
        refuse_shared_audio(_of(recordings, splits, "train"), _of(recordings, splits, "eval"))
    else:
        splits = hold_out_speakers(recordings, cfg.eval_share, seed)
    return _chunks(recordings, splits), len(recordings)


def _of(
    recordings: Sequence[Recording], splits: Sequence[Split], split: Split
) -> Iterator[Recording]:
    return (r for r, side in zip(recordings, splits, strict=True) if side == split)


def _chunks(recordings: Sequence[Recording], splits: Sequence[Split]) -> Iterator[_Job]:
    return (_Job(chosen, beside) for chosen, beside in chunks(recordings, splits))


def hold_out_speakers(recordings: Sequence[Recording], share: float, seed: int) -> list[Split]:
    """The split of every recording: `share` of the labelled speakers of each corpus are "eval".

    Each corpus keeps at least two speakers on either side (one can make no non-target trial), so a
    corpus of fewer than four labelled speakers trains as a whole; the unlabelled always train.

    A name is on one side in all corpora, for it may be one person: the first corpus that draws it
    decides. That comes before the two rules above; what it takes from a later corpus's share is
    made up for among the names that are in no corpus before.
    """
    speakers: dict[str, dict[str, str]] = {}
    for recording in recordings:
        if recording.speaker is not None:
            of_corpus = speakers.setdefault(recording.corpus, {})
            of_corpus[recording.speaker] = recording.sex or of_corpus.get(recording.speaker, "")
    held: set[str] = set()
    settled: set[str] = set()
    for corpus, sex_of in speakers.items():
        if len(sex_of) >= 4 and share > 0:
            rng = np.random.default_rng([seed, 3, *corpus.encode()])
            count = min(max(round(share * len(sex_of)), 2), len(sex_of) - 2)
            drawn = _draw_in_pairs(sex_of, count, rng)
            held.update(_beside_the_settled(drawn, sex_of, held, settled, rng))
            settled.update(sex_of)
    return ["eval" if r.speaker in held else "train" for r in recordings]


def _beside_the_settled(
    drawn: list[str],
    sex_of: dict[str, str],
    held: set[str],
    settled: set[str],
    rng: np.random.Generator,
) -> list[str]:
    """A corpus's draw without the names that are `settled` (some of them `held`) by others.

    Some more are drawn, or some fewer kept, where less than two speakers would be on a side.
    """
    chosen = [name for name in drawn if name not in settled]
    already = sum(name in held for name in sex_of)
    left = {n: sex for n, sex in sex_of.items() if n not in settled and n not in chosen}
    missing = min(2 - already - len(chosen), len(left))
    if missing > 0:
        return chosen + _draw_in_pairs(left, missing, rng)
    return chosen[: max(len(sex_of) - 2 - already, 0)]


def _draw_in_pairs(sex_of: dict[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` speakers, two of one sex at a time: non-target trials are made within a sex."""
    sexes = [str(sex) for sex in rng.permutation(sorted(set(sex_of.values())))]
    left = {
        sex: [str(n) for n in rng.permutation(sorted(n for n in sex_of if sex_of[n] == sex))]
        for sex in sexes
    }
    chosen: list[str] = []
    while len(chosen) < count:
        most = max(sexes, key=lambda sex: len(left[sex]))
        for _ in range(min(2, count - len(chosen), len(left[most]))):
            chosen.append(left[most].pop())
    return chosen


def _embedded_jobs(cfg: PrepareConfig, seed: int) -> tuple[Iterator[_Job], int]:
    if cfg.eval_paths:
        raise InputError("--eval-corpus without --corpus: the embedded corpus brings its own")
    voices = synthetic.make_voices(cfg.embedded.speakers, seed)
    as_recordings = [
        Recording(id=v.name, corpus="embedded", path=Path(v.name), speaker=v.name, sex=v.sex)
        for v in voices
    ]
    splits = hold_out_speakers(as_recordings, cfg.eval_share, seed)
    starts = range(0, len(voices), 8)
    jobs = (_Job(voices=voices[i : i + 8], splits=splits[i : i + 8]) for i in starts)
    return jobs, len(voices) * cfg.embedded.utterances


def _run_job(
    job: _Job, *, cfg: PrepareConfig, seed: int
) -> tuple[pa.Table, list[dict[str, str]], int]:
    """Rows, quarantine and number of recordings of one job; runs on a worker."""
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    for recording, samples, split in _decoded(job, cfg, seed, bad):
        rows.extend(_segments(recording, samples, split, cfg, bad))
    count = len(job.recordings) + len(job.voices) * cfg.embedded.utterances
    return pa.Table.from_pylist(rows, schema=UTTERANCES), bad, count


def _decoded(
    job: _Job, cfg: PrepareConfig, seed: int, bad: list[dict[str, str]]
) -> Iterator[tuple[Recording, np.ndarray, Split]]:
    limits = audio.AudioLimits(min_seconds=cfg.min_seconds)
    for recording, split in zip(job.recordings, job.splits, strict=False):
        try:
            if recording.problem is not None:
                raise audio.AudioError(recording.problem)
            yield recording, audio.decode(recording.source(), limits), split
        except audio.AudioError as error:
            bad.append(_quarantine_row(recording, str(error)))
    for voice, split in zip(job.voices, job.splits, strict=False):
        for spoken in synthetic.synthesize(voice, cfg.embedded.utterances, seed):
            recording = Recording(
                id=f"embedded/{spoken.id}",
                corpus="embedded",
                path=Path(spoken.id),
                speaker=voice.name,
                sex=voice.sex,
                text=spoken.text,
            )
            yield recording, spoken.samples, split


def _quarantine_row(recording: Recording, reason: str) -> dict[str, str]:
    return {"id": recording.id, "path": as_text(str(recording.path)), "reason": reason}


def _segments(
    recording: Recording,
    samples: np.ndarray,
    split: Split,
    cfg: PrepareConfig,
    bad: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    seconds = len(samples) / audio.SAMPLE_RATE
    pieces = max(1, int(np.ceil(seconds / cfg.segment_seconds - 1e-9)))
    silent = 0
    for number, piece in enumerate(np.array_split(samples, pieces)):
        speech = speech_share(piece, cfg.vad)
        if speech == 0.0:
            silent += 1
            continue
        speaker = recording.speaker
        yield {
            "id": recording.id if pieces == 1 else f"{recording.id}#{number:03d}",
            "corpus": recording.corpus,
            "speaker": None if speaker is None else f"{recording.corpus}:{speaker}",
            "sex": recording.sex,
            "text": recording.text if pieces == 1 else None,
            "split": split,
            "seconds": len(piece) / audio.SAMPLE_RATE,
            "speech": speech,
            "audio": audio.to_pcm16(piece),
        }
    if silent == pieces:
        bad.append(_quarantine_row(recording, "no speech found by the energy detector"))


def speech_share(samples: np.ndarray, vad: dict[str, Any]) -> float:
    """Share of 25 ms frames that the energy detector takes for speech, in [0, 1]."""
    import torch

    from goldcrest.kernels.frontend.mfcc import MfccSettings, mfcc
    from goldcrest.kernels.frontend.vad import energy_vad

    features = mfcc(torch.from_numpy(samples)[None], None, MfccSettings())
    settings = settings_of(f"{_FRONTEND}.vad", "VadSettings", vad)
    speech = energy_vad(features[0, :, 0], settings)
    return float(speech.float().mean()) if len(speech) else 0.0


def _check_shares(
    facts: pa.Table, quarantined: list[dict[str, str]], total: int, cfg: PrepareConfig
) -> None:
    examples = "; ".join(f"{row['path']}: {row['reason']}" for row in quarantined[:3])
    if facts.num_rows == 0:
        raise StepError(f"none of {total} recordings can be used: {examples}")
    if len(quarantined) > cfg.max_bad_share * total:
        raise StepError(
            f"{len(quarantined)} of {total} recordings can't be used, more than the allowed "
            f"{cfg.max_bad_share:.0%}: {examples}",
            hint="mend the corpus, or raise corpus.max_bad_share",
        )
    if "train" not in facts.column("split").to_pylist():
        raise StepError("no utterance is left for training", hint="lower corpus.eval_share")


def _report(facts: pa.Table, quarantined: int, out: Output) -> None:
    summary = {}
    for split in ("train", "eval"):
        mask = pc.equal(facts.column("split"), split)
        part = facts.filter(mask)
        speakers = {name for name in part.column("speaker").to_pylist() if name is not None}
        summary[split] = {
            "utterances": part.num_rows,
            "speakers": len(speakers),
            "hours": round(float(np.sum(part.column("seconds").to_numpy())) / 3600, 4),
        }
    out.metrics(quarantined=quarantined, corpus=summary)
    if shared := _on_both_sides(facts):
        shown = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
        note = (
            f"corpora for training and for evaluation have {len(shared)} speakers' names in "
            f"common ({shown}): if they are the same people, they were trained on"
        )
        out.metrics(notes={"speakers_on_both_sides": note})
        out.progress(1.0, note)
    out.figure("durations", _duration_figure(facts))


def _on_both_sides(facts: pa.Table) -> list[str]:
    """Names of speakers, without their corpus, in training and in evaluation."""
    names: dict[str, set[str]] = {"train": set(), "eval": set()}
    for row in facts.select(["speaker", "corpus", "split"]).to_pylist():
        if row["speaker"] is not None:
            names[row["split"]].add(row["speaker"].removeprefix(f"{row['corpus']}:"))
    return sorted(names["train"] & names["eval"])


def _duration_figure(facts: pa.Table) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    names = sorted(set(facts.column("corpus").to_pylist()))
    corpora = np.array(facts.column("corpus").to_pylist())
    seconds = facts.column("seconds").to_numpy()
    axes.hist([seconds[corpora == name] for name in names], bins=30, stacked=True, label=names)
    axes.set(xlabel="utterance length (s)", ylabel="utterances")
    axes.legend(loc="upper right", fontsize="small")
    return figure

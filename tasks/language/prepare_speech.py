"""Prepare speech: recordings with transcripts -> 16 kHz mono audio and its text, in Parquet shards.

Every recording is read, checked and resampled on a worker; what can't be used goes to quarantine
with a reason: no text, silence, longer than the model's window, not decodable. What is evaluated on
is held out by speakers, or by recordings; corpora for evaluation are for testing.

Artifact (the splits as in tasks/language/examples.py, a recording to a row: no prompt, the answer
is the text, which is its only reference):
    train/, validation/, test/    further columns: speaker, seconds, audio (16-bit PCM, 16 kHz)
    quarantine                    id, path, reason
    facts                         rows, seconds, characters and bytes of every split
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from goldcrest.cluster.api import Config, InputError, InputFiles, Output, StepError, task
from goldcrest.tasks.data import audio
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
from goldcrest.tasks.data.templates import FieldError
from goldcrest.tasks.language.cleaning import (
    Replacements,
    check_replacements,
    check_text,
    replaced,
)
from goldcrest.tasks.language.examples import SCHEMA, SPLITS, Split
from goldcrest.tasks.language.splits import sides

SPOKEN = (
    SCHEMA.append(pa.field("speaker", pa.string()))
    .append(pa.field("seconds", pa.float64()))
    .append(pa.field("audio", pa.binary()))
)
_QUARANTINE = pa.schema([("id", pa.string()), ("path", pa.string()), ("reason", pa.string())])
_MAX_TEXT_BYTES = 1 << 16


class SpeechCorpusConfig(Config):
    """Which recordings are read, and which of them are held out."""

    paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="corpora: folders, manifests or datasets://NAME (filled in by --corpus)"
    )
    eval_paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="corpora for testing only (filled in by --eval-corpus)"
    )
    names: tuple[str, ...] = Field(
        (), description="names of the corpora in ids; none: those of their folders"
    )
    beside: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="folders of corpora that are given as manifest files (filled in)"
    )
    layout: Layout = Field("auto", description="how folders are read; auto: found by looking")
    apart: Literal["speakers", "recordings"] = Field(
        "speakers",
        description="what is held out: speakers, all that they say (recordings of unknown ones "
        "one by one), or recordings, whoever speaks",
    )
    validation_share: float = Field(
        0.1, ge=0, lt=0.5, description="share of speakers (or recordings) held out for validation"
    )
    test_share: float = Field(
        0.1, ge=0, lt=0.5, description="likewise for testing, where no corpus is for evaluation"
    )
    min_seconds: float = Field(0.1, gt=0, description="shorter recordings are quarantined (s)")
    max_seconds: float = Field(
        30.0,
        gt=0,
        description="longer recordings are quarantined (s): the model's window, which is "
        "max_source_positions / 50",
    )
    replace_in_text: Replacements = Field(
        (), description="(regular expression, replacement) pairs, applied to transcripts in order"
    )
    max_train_rows: int | None = Field(
        None, ge=1, description="recordings for training at most, drawn at random"
    )
    max_eval_rows: int | None = Field(
        None, ge=1, description="recordings of each evaluation split at most, drawn at random"
    )
    max_bad_share: float = Field(
        0.2, ge=0, le=1, description="share of recordings that may be quarantined before it fails"
    )

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Names and audio folders belong to the result, so they must be in the key."""
        paths = (*self.paths, *self.eval_paths)
        if self.names and paths and len(self.names) != len(paths):
            raise ValueError(f"{len(self.names)} names for {len(paths)} corpora")
        if self.min_seconds >= self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds:g} leaves nothing to read")
        object.__setattr__(self, "names", self.names or corpus_names(paths))
        object.__setattr__(self, "beside", manifest_folders(paths))
        check_replacements(self.replace_in_text)
        return self


@dataclass(frozen=True)
class _Job:
    """Recordings for one worker, and the split of each."""

    recordings: Sequence[Recording]
    splits: Sequence[Split]


@dataclass(frozen=True)
class _Corpus:
    """What is known of all recordings before some are drawn."""

    recordings: int
    problems: int  # how many can't be used, which is known without reading their audio

    def unusable(self, bad: int, read: int) -> int:
        """Recordings of the whole corpus that can't be used: all known problems, and of the others
        as large a share as of those that were read. `bad` and `read` count the problems too."""
        tried = read - self.problems
        share = (bad - self.problems) / tried if tried else 0.0
        return self.problems + round(share * (self.recordings - self.problems))


@task(cpus=0, retry_on=(OSError,), timeout="12h")
def prepare_speech(cfg: SpeechCorpusConfig, out: Output) -> None:
    """Read, check and split the corpora (see the module docstring)."""
    recordings = _with_texts(cfg)
    splits = _splits(recordings, cfg, out.seed)
    chosen = _drawn(recordings, splits, cfg, out.seed)
    corpus = _Corpus(len(recordings), sum(each.problem is not None for each in recordings))
    recordings, splits = [recordings[i] for i in chosen], [splits[i] for i in chosen]
    work = functools.partial(_read_job, limits=_limits(cfg))
    bad: list[dict[str, str]] = []
    counts = {split: dict.fromkeys(("rows", "characters", "bytes"), 0) for split in SPLITS}
    seconds = dict.fromkeys(SPLITS, 0.0)
    read = 0
    with ExitStack() as stack:
        shards = {split: stack.enter_context(out.shards(split)) for split in SPLITS}
        jobs = (_Job(*each) for each in chunks(recordings, splits))
        for rows, refused, count in out.runtime.map(work, jobs, note="read"):
            for split, table in rows.items():
                shards[split].write(table)
                _count(counts[split], table)
                seconds[split] += float(pc.sum(table.column("seconds")).as_py() or 0.0)
            bad.extend(refused)
            read += count
            out.progress(read / len(recordings), f"{read} recordings, {len(bad)} bad")
    for split in SPLITS:
        if not counts[split]["rows"]:
            out.table(split, SPOKEN.empty_table())
    _check(bad, counts, read, corpus, cfg)
    out.table("quarantine", pa.Table.from_pylist(bad, schema=_QUARANTINE))
    summary: dict[str, Any] = {
        split: {**counts[split], "seconds": round(seconds[split], 3)} for split in SPLITS
    }
    facts = {"rows_read": read, "quarantined": len(bad)}
    out.json("facts", {**facts, "max_seconds": cfg.max_seconds, "splits": summary})
    out.metrics(**facts, corpus=summary)


def _limits(cfg: SpeechCorpusConfig) -> audio.AudioLimits:
    return audio.AudioLimits(min_seconds=cfg.min_seconds, max_seconds=cfg.max_seconds)


def _with_texts(cfg: SpeechCorpusConfig) -> list[Recording]:
    """All recordings, texts cleaned; those without a usable one say so in `problem`."""
    if not cfg.paths:
        raise InputError(
            "a speech model is trained on a corpus of recordings with their texts, none was given",
            hint="name one by --corpus: a folder with metadata.jsonl (file_name, text, speaker)",
        )
    found = read_corpora((*cfg.paths, *cfg.eval_paths), cfg.layout, cfg.names)
    if not any(each.text for each in found):
        raise InputError(
            f"none of the {len(found)} recordings in {', '.join(cfg.paths)} has a text, which a "
            "speech model learns to write",
            hint="give a metadata.jsonl, .csv or .parquet with the fields file_name and text",
        )
    return [_cleaned(each, cfg) for each in found]


def _cleaned(recording: Recording, cfg: SpeechCorpusConfig) -> Recording:
    if recording.text is None or recording.problem is not None:
        return replace(recording, problem=recording.problem or "it has no text")
    text = replaced(recording.text, cfg.replace_in_text).strip()
    try:
        check_text("text", text, _MAX_TEXT_BYTES)
    except FieldError as error:
        return replace(recording, problem=str(error))
    return replace(recording, text=text)


def _splits(recordings: Sequence[Recording], cfg: SpeechCorpusConfig, seed: int) -> list[Split]:
    """The split of every recording. One that can't be used counts nowhere: it is for training."""
    testing = set(cfg.names[len(cfg.paths) :])
    if testing:
        refuse_shared_audio(
            (each for each in recordings if each.corpus not in testing),
            (each for each in recordings if each.corpus in testing),
        )
    shares: dict[Split, float] = {} if testing else {"test": cfg.test_share}
    shares["validation"] = cfg.validation_share
    keys = [_key(each, cfg) for each in recordings]
    usable = {
        key
        for key, each in zip(keys, recordings, strict=True)
        if each.problem is None and each.corpus not in testing
    }
    side = sides(usable, shares, seed)
    return [
        "test" if each.corpus in testing else side.get(key, "train")
        for key, each in zip(keys, recordings, strict=True)
    ]


def _key(recording: Recording, cfg: SpeechCorpusConfig) -> str:
    """What must be on one side; a speaker's name may be one person in several corpora."""
    if cfg.apart == "speakers" and recording.speaker is not None:
        return f"speaker {recording.speaker}"
    return f"recording {recording.id}"


def _drawn(
    recordings: Sequence[Recording], splits: Sequence[Split], cfg: SpeechCorpusConfig, seed: int
) -> list[int]:
    """Places of the recordings that are kept, in order; all that have a problem are."""
    kept = [place for place, each in enumerate(recordings) if each.problem is not None]
    for number, split in enumerate(SPLITS):
        most = cfg.max_train_rows if split == "train" else cfg.max_eval_rows
        usable = [
            place
            for place, each in enumerate(recordings)
            if each.problem is None and splits[place] == split
        ]
        order = np.random.default_rng([seed, 9, number]).permutation(len(usable))
        kept += [usable[i] for i in order[:most]]
    return sorted(kept)


def _read_job(
    job: _Job, *, limits: audio.AudioLimits
) -> tuple[dict[Split, pa.Table], list[dict[str, str]], int]:
    """Rows by split, quarantine and number of recordings of one job; runs on a worker."""
    rows: dict[Split, list[dict[str, Any]]] = {}
    bad: list[dict[str, str]] = []
    for recording, split in zip(job.recordings, job.splits, strict=True):
        try:
            if recording.problem is not None:
                raise audio.AudioError(recording.problem)
            samples = audio.decode(recording.source(), limits)
        except audio.AudioError as error:
            path = as_text(str(recording.path))
            bad.append({"id": recording.id, "path": path, "reason": str(error)})
            continue
        rows.setdefault(split, []).append(_row(recording, samples, split))
    tables = {name: pa.Table.from_pylist(each, schema=SPOKEN) for name, each in rows.items()}
    return tables, bad, len(job.recordings)


def _row(recording: Recording, samples: np.ndarray, split: Split) -> dict[str, Any]:
    return {
        "id": recording.id,
        "prompt": "",
        "answer": recording.text,
        "references": [] if split == "train" else [recording.text],
        "speaker": recording.speaker,
        "seconds": len(samples) / audio.SAMPLE_RATE,
        "audio": audio.to_pcm16(samples),
    }


def _count(counts: dict[str, int], table: pa.Table) -> None:
    texts = table.column("answer").to_pylist()
    counts["rows"] += table.num_rows
    counts["characters"] += sum(len(text) for text in texts)
    counts["bytes"] += sum(len(text.encode()) for text in texts)


def _check(
    bad: Sequence[dict[str, str]],
    counts: dict[Split, dict[str, int]],
    read: int,
    corpus: _Corpus,
    cfg: SpeechCorpusConfig,
) -> None:
    examples = "; ".join(f"{row['path']}: {row['reason']}" for row in bad[:3])
    unusable, total = corpus.unusable(len(bad), read), corpus.recordings
    if unusable > cfg.max_bad_share * total:
        judged = "" if read == total else f" (judged by the {read - corpus.problems} drawn)"
        raise StepError(
            f"{unusable} of {total} recordings can't be used{judged}, more than the allowed "
            f"{cfg.max_bad_share:.0%}: {examples}",
            hint="mend the corpus, or raise speech.max_bad_share or speech.max_seconds",
        )
    if not counts["train"]["rows"]:
        raise StepError(
            "no recording is left for training",
            hint="lower speech.test_share, or set speech.apart to recordings",
        )

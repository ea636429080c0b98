"""Trials of the evaluation: drawn from the speakers' labels, or given as a list.

A list has a line `label utterance utterance` per trial (1: same speaker), as VoxCeleb's do. Files
are named by their path in the corpus, with or without the corpus's name in front. A recording that
was cut into segments is one side of a trial: its vector is the mean over its segments, each of unit
length. Trials whose recording went to quarantine are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from goldcrest.cluster.api import Artifact, InputError, Output
from goldcrest.tasks.data.corpus import recording_of

MAX_LINE = 4_096  # characters of a line of a trial list


@dataclass(frozen=True)
class TrialSet:
    """K trials over M recordings.

    `names` of the recordings, `segments` the utterance ids of each, first, second (K,) int64 are
    places in `names`; target (K,) bool; corpus (K,) names of the corpora.
    """

    names: list[str]
    segments: list[tuple[str, ...]]
    first: np.ndarray
    second: np.ndarray
    target: np.ndarray
    corpus: np.ndarray

    @property
    def utterances(self) -> list[str]:
        """The segments of all recordings, one after the other: (U,) ids."""
        return [name for names in self.segments for name in names]

    def pool(self, vectors: np.ndarray) -> np.ndarray:
        """(U, D) vectors of `utterances` -> (M, D) of the recordings, means of unit vectors."""
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        counts = [len(names) for names in self.segments]
        pooled = np.zeros((len(counts), vectors.shape[1]), np.float32)
        np.add.at(pooled, np.repeat(np.arange(len(counts)), counts), unit.astype(np.float32))
        return pooled / np.maximum(counts, 1)[:, None].astype(np.float32)


def drawn_trials(
    corpus: Artifact, split: str, *, max_targets: int, max_nontargets: int, out: Output
) -> TrialSet | None:
    """Seeded trials among a split's labelled utterances; None, with a note, if there are none."""
    from goldcrest.kernels.metrics.trials import make_trials

    facts = corpus.table("facts")
    facts = facts.filter(pc.and_(pc.equal(facts["split"], split), pc.is_valid(facts["speaker"])))
    if facts.num_rows < 2:
        out.metrics(notes={f"{split}_trials": "there are no labelled utterances"})
        return None
    try:
        made = make_trials(
            facts["speaker"].to_pylist(),
            facts["corpus"].to_pylist(),
            facts["sex"].to_pylist(),
            max_targets=max_targets,
            max_nontargets=max_nontargets,
            seed=out.seed,
        )
    except ValueError as reason:
        out.metrics(notes={f"{split}_trials": str(reason)})
        return None
    if made.left_out:
        out.metrics(notes={f"{split}_left_out": dict(made.left_out)})
    used, places = np.unique(np.concatenate([made.first, made.second]), return_inverse=True)
    ids = facts["id"].to_pylist()
    names = [ids[int(place)] for place in used]
    first, second = np.split(places, 2)
    segments: list[tuple[str, ...]] = [(name,) for name in names]
    return TrialSet(names, segments, first, second, made.target, made.corpus)


class _Recording(NamedTuple):
    """What the corpus knows of one recording of a list."""

    name: str
    corpus: str
    split: str
    segments: tuple[str, ...]


def given_trials(path: Path, corpus: Artifact, out: Output) -> TrialSet:
    """Read a trial list. InputError, with file and line, for what is not a trial of these corpora,
    and for recordings that were trained on."""
    known, lost = _recordings(corpus)
    names: dict[str, int] = {}
    found: list[_Recording] = []
    rows: list[tuple[int, ...]] = []  # target, first, second
    left_out = 0
    for where, target, pair in _lines(path):
        if any(name in lost for name in pair):
            left_out += 1
            continue
        for name in pair:
            if name not in known:
                raise InputError(f"{where}: utterance '{name}' is not in the corpora")
            recording = known[name]
            if recording.split != "eval":
                raise InputError(
                    f"{where}: utterance '{name}' was trained on",
                    hint="give the speech of the trial list with --eval-corpus",
                )
            if recording.name not in names:
                names[recording.name] = len(found)
                found.append(recording)
        rows.append((target, *(names[known[name].name] for name in pair)))
    if left_out:
        out.metrics(notes={"eval_left_out": f"{left_out} trials name quarantined recordings"})
    if len({row[0] for row in rows}) < 2:
        raise InputError(f"{path} needs target (1) and non-target (0) trials")
    target, first, second = np.array(rows).T
    corpora = np.array([recording.corpus for recording in found])
    segments = [recording.segments for recording in found]
    return TrialSet(list(names), segments, first, second, target == 1, corpora[first])


def _lines(path: Path) -> list[tuple[str, bool, tuple[str, str]]]:
    """`("file:line", target, (utterance, utterance))` of every line that is not empty."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"trial list {path} can't be read: {error}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line[:MAX_LINE].split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in ("0", "1"):
            raise InputError(f"{path}:{number}: a trial is `label utterance utterance`")
        found.append((f"{path}:{number}", parts[0] == "1", (parts[1], parts[2])))
    return found


def _recordings(corpus: Artifact) -> tuple[dict[str, _Recording], set[str]]:
    """The recordings, and the quarantined ones, by every name that a list may call them by.

    That is the id (`corpus/path`), and the path alone where only one corpus has it.
    """
    facts = corpus.table("facts", ["id", "corpus", "split"]).to_pylist()
    segments: dict[str, list[str]] = {}
    about: dict[str, tuple[str, str]] = {}
    for row in facts:
        name = recording_of(row["id"])
        segments.setdefault(name, []).append(row["id"])
        about[name] = (row["corpus"], row["split"])
    lost = [row["id"] for row in corpus.table("quarantine", ["id"]).to_pylist()]
    paths = Counter(name.partition("/")[2] for name in [*segments, *lost])
    known: dict[str, _Recording] = {}
    for name, parts in segments.items():
        recording = _Recording(name, *about[name], tuple(parts))
        known |= dict.fromkeys([*parts, *_calls(name, paths)], recording)
    return known, {call for name in lost for call in _calls(name, paths)}


def _calls(name: str, paths: Counter[str]) -> list[str]:
    path = name.partition("/")[2]
    return [name, path] if paths[path] == 1 else [name]

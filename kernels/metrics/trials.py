"""Seeded trial lists for speaker verification, drawn from speaker labels.

A trial is a pair of utterances: target (same speaker) or non-target (different speakers). Pairs are
drawn within a corpus, and non-targets within a sex where it is known: across corpora the recording
channel, across sexes the pitch gives the answer away, and the error rate says nothing of speakers.

Pairs are numbered without being listed. With the utterances of a group sorted by speaker, utterance
i is a target with the rest of its speaker's block, a non-target with all that follows the block;
the running count of both numbers every pair once, so a draw of numbers without replacement is a
draw of distinct pairs, whatever the size of the corpus.

N utterances   K trials
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """K trials over N utterances, targets and non-targets of one corpus after another."""

    first: IntArray  # (K,) utterance index, below `second`'s nowhere equal to it
    second: IntArray  # (K,) utterance index
    target: NDArray[np.bool_]  # (K,) True for the same speaker
    corpus: NDArray[np.str_]  # (K,) corpus of both utterances
    left_out: dict[str, str]  # corpora without trials, each with the reason in words

    def __len__(self) -> int:
        return len(self.target)


def make_trials(
    speakers: Sequence[str],
    corpora: Sequence[str] | None = None,
    sexes: Sequence[str | None] | None = None,
    *,
    max_targets: int = 4000,
    max_nontargets: int = 4000,
    seed: int = 0,
) -> Trials:
    """Draw at most `max_targets` target and `max_nontargets` non-target pairs per corpus.

    Args:
        speakers: speaker of each of the N utterances; a name means one person within a corpus.
        corpora: corpus of each utterance; None if all are of one.
        sexes: sex of each utterance, "" or None where unknown (the unknown form a group of their
            own); None if unknown for all.
        max_targets: most target pairs per corpus.
        max_nontargets: most non-target pairs per corpus.
        seed: the same labels and seed give the same trials.

    Returns:
        Trials without duplicates (in either order) and without self pairs. A corpus that has no
        pair of one of the kinds is left out whole: half its trials would shift the pooled scores.

    Raises:
        ValueError: lists of different lengths, limits below 1, or no corpus that has both kinds.
    """
    count = len(speakers)
    corpora = ["corpus"] * count if corpora is None else corpora
    sexes = [None] * count if sexes is None else sexes
    if not len(corpora) == len(sexes) == count:
        raise ValueError(
            f"speakers, corpora and sexes must be of one length, not {count}, {len(corpora)} and "
            f"{len(sexes)}"
        )
    if max_targets < 1 or max_nontargets < 1:
        raise ValueError("max_targets and max_nontargets must be at least 1")
    names, corpus_of = np.unique(np.asarray(corpora, dtype=str), return_inverse=True)
    sex_of = np.asarray([sex or "" for sex in sexes], dtype=str)
    speaker_of = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)[1]

    pairs: list[IntArray] = []
    kinds: list[NDArray[np.bool_]] = []
    origin: list[str] = []
    left_out: dict[str, str] = {}
    for index, name in enumerate(names.tolist()):
        # A generator per corpus: adding a corpus leaves the trials of the others as they were.
        rng = np.random.default_rng([seed, *name.encode()])
        inside = np.flatnonzero(corpus_of == index)
        targets = _draw(inside, speaker_of, np.zeros(count, dtype=str), True, max_targets, rng)
        nontargets = _draw(inside, speaker_of, sex_of, False, max_nontargets, rng)
        reason = _reason(inside, speaker_of, len(targets), len(nontargets))
        if reason is not None:
            left_out[name] = reason
            continue
        pairs += [targets, nontargets]
        kinds += [np.ones(len(targets), dtype=bool), np.zeros(len(nontargets), dtype=bool)]
        origin += [name] * (len(targets) + len(nontargets))
    if not pairs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no verification trials can be drawn: {reasons or 'no utterances'}")
    both = np.concatenate(pairs)
    return Trials(
        first=both[:, 0],
        second=both[:, 1],
        target=np.concatenate(kinds),
        corpus=np.asarray(origin, dtype=str),
        left_out=left_out,
    )


def _reason(inside: IntArray, speaker_of: IntArray, targets: int, nontargets: int) -> str | None:
    """Why a corpus can have no trials, or None if it can."""
    speakers = len(np.unique(speaker_of[inside]))
    if speakers == 1:
        return f"all {len(inside)} utterances are of one speaker, so there are no non-targets"
    if targets == 0:
        return f"none of its {speakers} speakers has two utterances, so there are no targets"
    if nontargets == 0:
        return f"no two of its {speakers} speakers are of the same sex"
    return None


def _draw(
    inside: IntArray,
    speaker_of: IntArray,
    group_of: NDArray[np.str_],
    target: bool,
    limit: int,
    rng: np.random.Generator,
) -> IntArray:
    """At most `limit` distinct pairs (K, 2), in the order of their numbers, within the groups."""
    order: list[IntArray] = []
    start: list[IntArray] = []  # position in `ordered` of each utterance's first partner
    partners: list[IntArray] = []
    offset = 0
    for group in np.unique(group_of[inside]):
        members = inside[group_of[inside] == group]
        members = members[np.argsort(speaker_of[members], kind="stable")]
        block_end = np.searchsorted(speaker_of[members], speaker_of[members], side="right")
        position = np.arange(len(members))
        first = position + 1 if target else block_end
        order.append(members)
        start.append(offset + first)
        partners.append((block_end if target else len(members)) - first)
        offset += len(members)
    if not order:
        return np.empty((0, 2), dtype=np.int64)
    ordered, starts = np.concatenate(order), np.concatenate(start)
    numbered = np.cumsum(np.concatenate(partners))
    total = int(numbered[-1])
    if total > limit:
        chosen = np.sort(rng.choice(total, size=limit, replace=False, shuffle=False))
    else:
        chosen = np.arange(total)
    one = np.searchsorted(numbered, chosen, side="right")
    before = np.where(one > 0, numbered[one - 1], 0)
    other = starts[one] + chosen - before
    pairs = np.stack([ordered[one], ordered[other]], axis=1)
    return np.sort(pairs, axis=1).astype(np.int64)

"""Scores of speaker verification trials: cosine, averaging over crops, fusion of systems.

Sources: cosine scoring, N. Dehak et al., "Front-End Factor Analysis for Speaker Verification",
IEEE TASLP 2011, section III-C; crop averaging, J. S. Chung et al., "VoxCeleb2", Interspeech 2018,
section 4.3, in the form 0.5 (full + mean of the crop pairs).

N utterances   E embedding dimensions   K trials   C crops per utterance
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def length_normalise(embeddings: ArrayLike) -> FloatArray:
    """Embeddings (..., E) scaled to unit length, float64; a zero vector stays zero."""
    values = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(norms > 0, norms, 1.0)


def cosine_scores(embeddings: ArrayLike, first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Cosine of each trial: embeddings (N, E), indices (K,) and (K,) -> (K,) float64."""
    unit = length_normalise(embeddings)
    return np.einsum("ke,ke->k", unit[np.asarray(first)], unit[np.asarray(second)])


def crop_scores(
    embeddings: ArrayLike, crops: ArrayLike, first: ArrayLike, second: ArrayLike
) -> FloatArray:
    """Scores averaged over the full utterances and their crops (test-time augmentation).

    0.5 (cosine of the full utterances + mean of the C x C cosines of their crops)

    Args:
        embeddings: (N, E) of the full utterances.
        crops: (N, C, E) of their crops, such as five evenly spaced ones of 3 s.
        first: (K,) index of each trial's first utterance.
        second: (K,) index of its second.

    Returns:
        (K,) float64.
    """
    # The mean over all pairs of dot products is the dot product of the means.
    mean = length_normalise(crops).mean(axis=1)
    paired = np.einsum("ke,ke->k", mean[np.asarray(first)], mean[np.asarray(second)])
    return 0.5 * (cosine_scores(embeddings, first, second) + paired)


def crop_scores_reference(
    embeddings: ArrayLike, crops: ArrayLike, first: ArrayLike, second: ArrayLike
) -> FloatArray:
    """`crop_scores` with every pair of crops written out."""
    full, parts = length_normalise(embeddings), length_normalise(crops)
    scores = [
        0.5 * (full[a] @ full[b] + np.mean([x @ y for x in parts[a] for y in parts[b]]))
        for a, b in zip(np.asarray(first), np.asarray(second), strict=True)
    ]
    return np.asarray(scores)


def z_normalise(scores: ArrayLike, reference: ArrayLike | None = None) -> FloatArray:
    """Scores (K,) shifted and scaled to mean 0 and deviation 1 of `reference`, without labels.

    `reference` is the list the two figures are taken from, by default the scores themselves.
    Scores that are all equal become 0.
    """
    values = np.asarray(scores, dtype=np.float64)
    base = values if reference is None else np.asarray(reference, dtype=np.float64)
    deviation = base.std()
    return (values - base.mean()) / (deviation if deviation > 0 else 1.0)


def fuse(
    scores: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
) -> FloatArray:
    """Weighted mean of several systems' scores, each z-normalised over the trial list first.

    Neither the normalisation nor the weights see the labels. Scores that are already comparable
    (after `asnorm`, say) lose nothing by the normalisation.

    Args:
        scores: one (K,) list per system, for the same trials in the same order.
        weights: one per system, not all zero; None weighs all alike.

    Returns:
        (K,) float64.

    Raises:
        ValueError: no system, lists of different lengths, or weights that do not fit.
    """
    lists = [np.asarray(system, dtype=np.float64) for system in scores]
    if not lists or any(system.shape != lists[0].shape for system in lists):
        raise ValueError(
            f"fusion needs score lists of one length, not {[system.shape for system in lists]}"
        )
    share = np.ones(len(lists)) if weights is None else np.asarray(weights, dtype=np.float64)
    if share.shape != (len(lists),) or (share < 0).any() or share.sum() <= 0:
        raise ValueError(
            f"fusion of {len(lists)} systems needs as many weights, none negative, not {weights}"
        )
    return np.average([z_normalise(system) for system in lists], axis=0, weights=share)

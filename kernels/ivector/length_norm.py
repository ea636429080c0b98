"""Centring, whitening and length normalisation of i-vectors.

Source: Garcia-Romero and Espy-Wilson, "Analysis of i-vector length normalization" (2011).

    y = A (x - mean),   A A^T = inverse of the covariance of the training vectors (or A = I)
    z = y / |y|         (Kaldi: times sqrt(R))

    N vectors   R dimensions
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldcrest.kernels.ivector.records import TensorRecord

__all__ = ["Whitening", "fit_whitening", "length_normalise", "whiten"]

TARGETS = ("unit", "sqrt_dim")


@dataclass(frozen=True, kw_only=True)
class Whitening(TensorRecord):
    """mean (R,) and transform (R, R): y = (x - mean) @ transform."""

    mean: Tensor
    transform: Tensor


def fit_whitening(vectors: Tensor, *, strength: float = 1.0, floor: float = 1e-6) -> Whitening:
    """Estimate centring and whitening from unlabelled vectors.

    Args:
        vectors: (N, R) float.
        strength: exponent on the inverse covariance: 0 centres only, 1 whitens fully, between
            them the eigenvalues are only partly equalised.
        floor: smallest eigenvalue divided by, as a share of the largest.

    Raises:
        ValueError: fewer than two vectors, or a strength outside [0, 1].
    """
    if vectors.ndim != 2 or vectors.shape[0] < 2:
        raise ValueError(f"whitening needs two vectors or more (N, R), got {tuple(vectors.shape)}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], not {strength}")
    x = vectors.double()
    mean = x.mean(0)
    values, basis = torch.linalg.eigh((x - mean).T @ (x - mean) / x.shape[0])
    values = values.clamp_min(max(float(values[-1]) * floor, torch.finfo(x.dtype).tiny))
    transform = (basis * values.pow(-0.5 * strength)) @ basis.T
    return Whitening(mean=mean, transform=transform)


def whiten(vectors: Tensor, whitening: Whitening) -> Tensor:
    """Apply `fit_whitening`'s result: (N, R) -> (N, R) float64."""
    return (vectors.double() - whitening.mean) @ whitening.transform


def length_normalise(vectors: Tensor, *, target: str = "unit") -> Tensor:
    """Scale every row to norm 1 ("unit") or sqrt(R) ("sqrt_dim", Kaldi); zero rows stay zero."""
    if target not in TARGETS:
        raise ValueError(f"target '{target}' is unknown; choose one of {TARGETS}")
    norm = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    scale = 1.0 if target == "unit" else vectors.shape[1] ** 0.5
    return vectors / norm * scale

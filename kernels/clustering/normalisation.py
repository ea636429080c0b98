"""Normalisation of vectors before clustering: unit rows ("l2") or standardised columns.

N utterances, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

Norm = Literal["l2", "standard", "none"]
"""`l2`: every row to unit length; `standard`: every column to mean 0 and variance 1."""


def check_norm(norm: str) -> None:
    """Refuse an unknown normalisation with a ValueError that names the known ones."""
    if norm not in get_args(Norm):
        raise ValueError(f"unknown norm '{norm}'; there are {', '.join(get_args(Norm))}")


def fit_norm(x: Tensor, norm: Norm) -> dict[str, Tensor]:
    """The tensors that `apply_norm` needs, learnt from x (N, D); constant columns keep scale 1."""
    if norm == "standard":
        scale = x.std(dim=0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return {"norm.mean": x.mean(dim=0), "norm.scale": scale}
    return {"norm.l2": torch.ones(1)} if norm == "l2" else {}


def apply_norm(model: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x (N, D) float32 normalised as `fit_norm` decided; a row of zeros stays zero."""
    x = x.to(torch.float32)
    if "norm.mean" in model:
        return (x - model["norm.mean"]) / model["norm.scale"]
    return normalize(x, dim=1, eps=1e-12) if "norm.l2" in model else x

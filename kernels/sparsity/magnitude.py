"""Magnitude pruning: the smallest weights go, nothing is corrected.

Source: S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015. With scope "global" one threshold holds over all layers, so a layer of small weights
is pruned harder than another; "layer" prunes every layer alike.

R rows   D columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from goldcrest.kernels.sparsity.masks import (
    check_pattern,
    check_sparsity,
    keep_highest,
    keep_n_of_m,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of magnitude pruning."""

    scope: Literal["layer", "global"] = "layer"  # where weights compete
    pattern: tuple[int, int] | None = None  # (n, m): n zeros in every m columns

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", tuple(self.pattern))  # JSON gives lists
        check_pattern(self.pattern)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global', not '{self.scope}'")
        if self.scope == "global" and self.pattern is not None:
            raise ValueError("a pattern prunes every layer alike: it has no scope 'global'")


def prune(
    weight: Tensor, hessian: Tensor | None, *, sparsity: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Zero the round(sparsity * R * D) smallest weights of (R, D); `hessian` is not looked at.

    Returns the new weight and its mask. Raises ValueError for a sparsity outside [0, 1].
    """
    check_sparsity(sparsity)
    scores = weight.detach().abs()
    if settings.pattern is None:
        mask = keep_highest(scores, round(sparsity * weight.numel()))
    else:
        mask = keep_n_of_m(scores, settings.pattern)
    return weight.detach() * mask, mask


def layer_sparsities(
    weights: Mapping[str, Tensor], sparsity: float, settings: Settings
) -> dict[str, float]:
    """Each layer's share of zeros such that all of them together have `sparsity`.

    With scope "global" the shares are those that one threshold over all weights gives.
    """
    check_sparsity(sparsity)
    if settings.scope == "layer":
        return dict.fromkeys(weights, sparsity)
    scores = torch.cat([weight.detach().abs().reshape(-1) for weight in weights.values()])
    mask = keep_highest(scores, round(sparsity * scores.numel()))
    sizes = [weight.numel() for weight in weights.values()]
    parts = mask.split(sizes)
    return {
        name: int((~part).sum()) / part.numel() for name, part in zip(weights, parts, strict=True)
    }

"""Cosines between embeddings and class weights: what all margin losses but plain CE start from.

B embeddings   E dimensions   N classes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def class_weights(classes: int, embedding_dim: int) -> nn.Parameter:
    """Random class weights (N, E), Xavier normal; raises ValueError for fewer than two classes."""
    if classes < 2:
        raise ValueError(f"a classification loss needs at least 2 classes, not {classes}")
    weight = nn.Parameter(torch.empty(classes, embedding_dim))
    nn.init.xavier_normal_(weight)
    return weight


def cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    """cos_j = <x/||x||, W_j/||W_j||>: (B, E) and (N, E) -> (B, N), float32 in any precision."""
    x = F.normalize(embeddings.float(), dim=1)
    return F.linear(x, F.normalize(weight.float(), dim=1))


def replace_target(cosine: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """`cosine` (B, N) with the label's column of every row replaced by `target` (B,)."""
    return cosine.scatter(1, labels[:, None], target[:, None])


def target_cosine(cosine: Tensor, labels: Tensor) -> Tensor:
    """cos_y (B,): the label's column of every row of (B, N)."""
    return cosine.gather(1, labels[:, None])[:, 0]

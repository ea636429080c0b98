"""Supervised contrast whose labels are the network's own present clusters.

Source: Khosla et al. 2020 (SupCon); Fathan & Alam 2025, section on online pseudo-labels. Features
are l2-normalised logits z_i = f(x_i)/|f(x_i)|, labels yhat_i = argmax_c f(x_i)_c (no gradient):

    P(i) = {j != i: yhat_j = yhat_i}
    l_i  = -1/|P(i)| sum_{j in P(i)} [ z_i.z_j/tau - log sum_{k != i} exp(z_i.z_k/tau) ]
    L    = tau/base * mean of l_i over the anchors with |P(i)| >= 1

With many clusters most anchors are alone; dividing by their |P(i)| = 0 is a NaN, so they are left
out. The sum over positives needs no B x B matrix: sum_{j in P(i)} z_i.z_j = z_i.(s_yhat_i - z_i)
with the class sums s_c.

B batch, W workers, C clusters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from goldcrest.kernels.clustering.parallel import rank, rows_of_all_workers, workers
from goldcrest.kernels.clustering.terms.contrast import log_sum_exp_others, unit_logits

AnchorMean = Literal["positive", "all"]


def supcon_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    base_temperature: float = 1.0,
    anchor_mean: AnchorMean = "positive",
    block: int = 4096,
) -> Tensor:
    """The SupCon loss of logits (B, C) with labels (B,) int64, by default their arg max.

    `anchor_mean="all"` divides by the batch instead of by the anchors that have a positive. Zero,
    with zero gradient, where no anchor has one. Anchors are this worker's rows, keys all workers'.
    """
    if labels is None:
        labels = logits.detach().argmax(dim=1)
    z = unit_logits(logits)
    keys, key_labels = rows_of_all_workers(z), rows_of_all_workers(labels)
    _, classes = key_labels.unique(return_inverse=True)
    sizes = classes.bincount()
    mine = slice(rank() * len(z), (rank() + 1) * len(z))
    sums = keys.new_zeros(len(sizes), keys.shape[1]).index_add(0, classes, keys)
    positives = (sizes[classes] - 1)[mine]
    anchors = len(keys) if anchor_mean == "all" else int((sizes[classes] > 1).sum())
    if not bool((sizes > 1).any()):
        return logits.sum() * 0.0
    own = torch.arange(len(z), device=z.device) + mine.start
    pull = (z * (sums[classes[mine]] - z)).sum(dim=1) / temperature / positives.clamp_min(1)
    push = log_sum_exp_others(z, keys, own, temperature=temperature, block=block)
    losses = torch.where(positives > 0, push - pull, torch.zeros_like(push))
    # Each worker gives its share of the whole batch's mean, times W: their mean is the whole.
    return temperature / base_temperature * losses.sum() / anchors * workers()


def supcon_loss_reference(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, base_temperature: float = 1.0
) -> Tensor:
    """The plain twin of `supcon_loss` (one worker, mean over positive anchors): the double loop."""
    z = unit_logits(logits)
    losses = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            scores = {k: z[i] @ z[k] / temperature for k in others}
            push = torch.stack(list(scores.values())).logsumexp(dim=0)
            losses.append(-torch.stack([scores[j] - push for j in positives]).mean())
    mean = torch.stack(losses).mean() if losses else logits.sum() * 0.0
    return temperature / base_temperature * mean

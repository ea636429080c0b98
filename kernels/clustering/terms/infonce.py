"""InfoNCE (NT-Xent): a sample's augmented copy should be nearer than every other row.

Source: Chen et al. 2020 (SimCLR); Fathan & Alam 2025, equation 10.8. Z_i are the logits of x_i,
Z_{i+B} those of its augmented copy, sim the cosine:

    l_ij = -log( exp(sim(Z_i, Z_j)/tau) / sum_{k != i} exp(sim(Z_i, Z_k)/tau) )
    L    = mean over the 2B rows, each against its copy

B batch, W workers, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldcrest.kernels.clustering.parallel import rank, rows_of_all_workers, workers
from goldcrest.kernels.clustering.terms.contrast import log_sum_exp_others, unit_logits


def infonce_loss(
    logits: Tensor, augmented: Tensor, *, temperature: float = 1.0, block: int = 4096
) -> Tensor:
    """Equation 10.8 for the logits (B, C) of samples and of their copies, paired by row.

    Keys are the 2WB rows of all workers; the value is this worker's mean.
    """
    a, b = unit_logits(logits), unit_logits(augmented)
    keys = torch.cat([rows_of_all_workers(a), rows_of_all_workers(b)])
    rows = torch.arange(len(a), device=a.device) + rank() * len(a)
    own = torch.cat([rows, rows + workers() * len(a)])
    push = log_sum_exp_others(torch.cat([a, b]), keys, own, temperature=temperature, block=block)
    return push.mean() - (a * b).sum(dim=1).mean() / temperature


def infonce_loss_reference(
    logits: Tensor, augmented: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The plain twin of `infonce_loss` (one worker): a loop over the 2B rows."""
    z = unit_logits(torch.cat([logits, augmented]))
    rows = len(logits)
    losses = []
    for i in range(2 * rows):
        scores = z @ z[i] / temperature
        others = torch.cat([scores[:i], scores[i + 1 :]])
        losses.append(others.logsumexp(dim=0) - scores[(i + rows) % (2 * rows)])
    return torch.stack(losses).mean()

"""InfoNCE (NT-Xent): a sample's augmented copy should be nearer than every other row.

Source: Chen et al. 2020 (SimCLR); Fathan & Alam 2025, equation 10.8. Z_i are the logits of x_i,
Z_{i+B} those of its augmented copy, sim the cosine:

    l_ij = -log( exp(sim(Z_i, Z_j)/tau) / sum_{k != i} exp(sim(Z_i, Z_k)/tau) )
    L    = mean over the 2B rows, each against its copy

The authors also tried sim = -KL(p_i || p_j) of the predictions, found it worse, and so do we offer
it as an option only (`distance="kl"`).

B batch, W workers, C clusters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from goldcrest.kernels.clustering.parallel import rank, rows_of_all_workers, workers
from goldcrest.kernels.clustering.terms.contrast import log_sum_exp_others, unit_logits

Distance = Literal["cosine", "kl"]


def infonce_loss(
    logits: Tensor,
    augmented: Tensor,
    *,
    temperature: float = 1.0,
    distance: Distance = "cosine",
    block: int = 4096,
) -> Tensor:
    """Equation 10.8 for the logits (B, C) of samples and of their copies, paired by row.

    Keys are the 2WB rows of all workers; the value is this worker's mean. The cosine goes through
    blocks of `block` rows; "kl" holds the 2B x 2WB similarities at once.
    """
    if distance == "kl":
        return _kl_infonce(logits, augmented, temperature)
    a, b = unit_logits(logits), unit_logits(augmented)
    keys = torch.cat([rows_of_all_workers(a), rows_of_all_workers(b)])
    rows = torch.arange(len(a), device=a.device) + rank() * len(a)
    own = torch.cat([rows, rows + workers() * len(a)])
    push = log_sum_exp_others(torch.cat([a, b]), keys, own, temperature=temperature, block=block)
    return push.mean() - (a * b).sum(dim=1).mean() / temperature


def _kl_infonce(logits: Tensor, augmented: Tensor, temperature: float) -> Tensor:
    """-KL(i || j) = sum_c p_ic log p_jc - sum_c p_ic log p_ic; the last term cancels in l_ij."""
    queries = torch.cat([logits, augmented]).log_softmax(dim=1)
    keys = torch.cat([rows_of_all_workers(part) for part in queries.chunk(2)])
    scores = queries.exp() @ keys.T / temperature
    rows = torch.arange(len(logits), device=logits.device) + rank() * len(logits)
    shift = workers() * len(logits)
    own, other = torch.cat([rows, rows + shift]), torch.cat([rows + shift, rows])
    mine = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, own[:, None], True)
    push = scores.masked_fill(mine, -torch.inf).logsumexp(dim=1)
    return (push - scores.gather(1, other[:, None])[:, 0]).mean()


def infonce_loss_reference(
    logits: Tensor,
    augmented: Tensor,
    *,
    temperature: float = 1.0,
    distance: Distance = "cosine",
) -> Tensor:
    """The plain twin of `infonce_loss` (one worker): a loop over the 2B rows."""
    both = torch.cat([logits, augmented])
    z, log_p = unit_logits(both), both.log_softmax(dim=1)
    rows = len(logits)
    losses = []
    for i in range(2 * rows):
        alike = z @ z[i]
        if distance == "kl":
            alike = -(log_p[i].exp() * (log_p[i] - log_p)).sum(dim=1)
        scores = alike / temperature
        others = torch.cat([scores[:i], scores[i + 1 :]])
        losses.append(others.logsumexp(dim=0) - scores[(i + rows) % (2 * rows)])
    return torch.stack(losses).mean()

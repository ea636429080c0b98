"""Exact data-parallel losses: means and rows over all workers, with their gradients.

Some terms are not means over samples: the entropy of the batch-mean prediction, contrasts against
every other row, batch normalisation. With W workers, each holding B rows, these functions give the
value for the whole batch of W*B rows. They are written for an engine that *averages* gradients over
the workers: the mean of the workers' gradients is then the gradient of the whole batch's loss.
Without a process group (or with one worker) they are the identity.

W workers, B rows of a worker, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def workers() -> int:
    """Number of data-parallel workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, 0 without a process group."""
    return dist.get_rank() if workers() > 1 else 0


class _Sum(torch.autograd.Function):
    """Sum over workers; the gradient of every worker's copy flows back to every worker."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def total_over_workers(x: Tensor) -> Tensor:
    """The sum of x over all workers, any shape, differentiable."""
    return _Sum.apply(x) if workers() > 1 else x


def mean_over_workers(x: Tensor) -> Tensor:
    """The mean of x over all workers, any shape, differentiable."""
    return total_over_workers(x) / workers()


class _Gather(torch.autograd.Function):
    """Rows of all workers; a row's gradient is summed over the workers that used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(workers())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def rows_of_all_workers(x: Tensor) -> Tensor:
    """Rows (B, ...) of every worker in rank order, (W*B, ...), differentiable; B equal for all."""
    return _Gather.apply(x) if workers() > 1 else x

"""Divergences between predictions given as logits, mean over the batch.

Computed from log-softmax in at least float32, whatever the precision of the network.

B batch, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Half-precision x as float32; entropies and log-sum-exps lose too much in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of logits (B, C) in at least float32."""
    return full_precision(logits).log_softmax(dim=1)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(target) || softmax(logits)), both (B, C), nats, >= 0.

    Gradients flow through both sides; detach `target` for a fixed one.
    """
    log_p, log_q = log_probabilities(target), log_probabilities(logits)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of -sum_c softmax(target)_c log softmax(logits)_c, both (B, C), nats."""
    return -(log_probabilities(target).exp() * log_probabilities(logits)).sum(dim=1).mean()

"""What a language model's logits are compared with, and the mean over tokens.

    causal    the logits of position t predict the token of position t + 1
    seq2seq   the decoder is fed the labels moved right by one: its position t predicts label t
    masked    the logits of position t predict the token that was hidden there

Positions whose target is -100 (prompts, padding, tokens that were not hidden) have no loss. All
losses are means over the other positions of a batch, so a batch's padding does not count.

B batch   T positions   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LOSS = -100


def predictions(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits (B, T', V) and the targets (B, T') that they predict; -100 where there is none.

    `shifted` is for causal models: T' = T - 1, the first token is predicted from nothing. What is
    selected by `targets != -100` are positions that predict a valid label, not those whose own
    label is valid: one position apart.
    """
    return (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per valid target, a scalar in float32; 0 if there is none."""
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=NO_LOSS, reduction="sum"
    )
    return total / (targets != NO_LOSS).sum().clamp(min=1)


def decoder_inputs(labels: Tensor, *, start: int, pad: int) -> Tensor:
    """What a decoder is fed to predict `labels` (B, T): they are moved right by one.

    -100 becomes `pad`: a causal decoder sees it from positions without a loss only.
    """
    fed = torch.full_like(labels, start)
    fed[:, 1:] = labels[:, :-1]
    return fed.masked_fill(fed == NO_LOSS, pad)

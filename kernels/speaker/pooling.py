"""Pooling of frames into one vector per utterance, with statistics masked by length.

Sources: K. Okabe, T. Koshinaka, K. Shinoda, "Attentive Statistics Pooling for Deep Speaker
Embedding", Interspeech 2018 (attentive mean and standard deviation); B. Desplanques,
J. Thienpondt, K. Demuynck, "ECAPA-TDNN", Interspeech 2020, section 2.1 (attention per channel
that also sees the utterance's plain mean and standard deviation), equations (1)-(4).

B utterances   H channels   A attention channels   T frames

`mask` is (B, 1, T) float, 1 on real frames and 0 on padded ones; None means that all are real.
Sums and variances are taken in float32 whatever the network's precision: in half precision
E[h^2] - E[h]^2 cancels and its square root becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

VARIANCE_FLOOR = 1e-4
"""Least variance of a channel over time: keeps the gradient of the square root finite."""

AspVariant = Literal["ecapa", "tao"]


@dataclass(frozen=True, kw_only=True)
class PoolingSettings:
    """Attentive statistics pooling of `channels` channels; its output has twice as many."""

    channels: int  # H, channels that come in
    attention_channels: int = 128  # A, bottleneck of the attention
    variant: AspVariant = "ecapa"  # "tao" puts ReLU and BatchNorm before the tanh

    def __post_init__(self) -> None:
        for name in ("channels", "attention_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.variant not in ("ecapa", "tao"):
            raise ValueError(f"pooling variant must be 'ecapa' or 'tao', not '{self.variant}'")


def length_mask(lengths: Tensor, frames: int) -> Tensor:
    """Mask (B, 1, T) float32 of utterances of `lengths` (B,) int frames padded to `frames`.

    Raises ValueError if a length is below 1 or above `frames`.
    """
    if lengths.ndim != 1 or bool((lengths < 1).any()) or bool((lengths > frames).any()):
        raise ValueError(
            f"lengths must be (B,) whole numbers from 1 to the {frames} frames of the batch, "
            f"not {lengths.tolist()}"
        )
    positions = torch.arange(frames, device=lengths.device)
    return (positions < lengths[:, None]).float()[:, None, :]


def masked_mean(h: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real frames: (B, H, T) -> (B, H) float32."""
    h = h.float()
    if mask is None:
        return h.mean(dim=2)
    return (h * mask).sum(dim=2) / mask.sum(dim=2)


def weighted_statistics(h: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, H) under frame weights that sum to 1 over T.

    `h` is (B, H, T), `weights` (B, H or 1, T). The variance is the biased one, floored at
    `VARIANCE_FLOOR`, as in equations (3) and (4).
    """
    h = h.float()
    mean = (weights * h).sum(dim=2)
    # Around the mean rather than E[h^2] - mean^2: equal on paper, no cancellation in float32.
    variance = (weights * (h - mean[:, :, None]).square()).sum(dim=2)
    return mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()


def plain_statistics(h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, H) over the real frames of (B, H, T), equally weighted."""
    if mask is None:
        weights = h.new_full((1, 1, 1), 1.0 / h.shape[2], dtype=torch.float32)
    else:
        weights = mask / mask.sum(dim=2, keepdim=True)
    return weighted_statistics(h, weights)


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over (B, C, T) whose training statistics count real frames only.

    Without it a batch that is padded trains towards the statistics of its padding. In eval mode,
    or without a mask, it is BatchNorm1d itself. In half precision its statistics stay float32:
    a running mean in bfloat16 stops moving once a step is under 1/256 of it.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (B, C, T) or (B, C); padded frames come out as 0 in training mode."""
        if mask is None or not self.training:
            return self._normalise(input)
        real = mask[:, 0, :] > 0
        frames_NC = self._normalise(input.transpose(1, 2)[real])
        output = torch.zeros_like(input).transpose(1, 2)
        output[real] = frames_NC
        return output.transpose(1, 2)

    def _normalise(self, input: Tensor) -> Tensor:
        """BatchNorm1d in any mixture of precisions, such as an engine for bfloat16 makes."""
        if input.dtype is torch.float32 and self.weight.dtype is torch.float32:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, variance = self.running_mean.float(), self.running_var.float()
        output = nn.functional.batch_norm(
            input.float(), mean, variance, self.weight.float(), self.bias.float(),
            self.training, self.momentum or 0.0, self.eps,
        )  # fmt: skip
        if self.training:
            self.num_batches_tracked.add_(1)
        if self.training and self.running_mean.dtype is not torch.float32:  # else moved in place
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
        return output.to(input.dtype)


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and standard deviation per channel: (B, H, T) -> (B, 2H).

    The attention of a frame sees the frame and the plain mean and deviation of its utterance:

        g_t = [h_t; mean; std]      e_t = W2 tanh(W1 g_t + b1) + b2      alpha = softmax over t
    """

    def __init__(self, settings: PoolingSettings) -> None:
        super().__init__()
        self.settings = settings
        wide, narrow = settings.channels, settings.attention_channels
        self.reduce = nn.Conv1d(3 * wide, narrow, kernel_size=1)
        self.norm = MaskedBatchNorm1d(narrow) if settings.variant == "tao" else None
        self.expand = nn.Conv1d(narrow, wide, kernel_size=1)

    def attention(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights alpha (B, H, T) float32: sum 1 over real frames, 0 on padded ones."""
        mean, std = plain_statistics(h, mask)
        context = torch.cat([mean, std], dim=1)[:, :, None].to(h.dtype)
        hidden = self.reduce(torch.cat([h, context.expand(-1, -1, h.shape[2])], dim=1))
        if self.norm is not None:
            hidden = self.norm(torch.relu(hidden), mask)
        energy = self.expand(torch.tanh(hidden)).float()
        if mask is not None:
            energy = energy.masked_fill(mask == 0, float("-inf"))
        return torch.softmax(energy, dim=2)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool frames (B, H, T) into [mean; deviation] (B, 2H) float32."""
        mean, std = weighted_statistics(h, self.attention(h, mask))
        return torch.cat([mean, std], dim=1)

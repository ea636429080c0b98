"""Smoothing: outlier channels of an activation are moved into the weights that read it.

Source: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023, equations (3)-(4). Per input channel j of what one normalisation feeds:

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)        norm's weight, bias /= s      W_:,j *= s_j

The function stays what it was; where several layers read the channel, the maximum is over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LEAST = 1e-5
"""Lower bound of a smoothing scale and of what it is made of."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of smoothing."""

    alpha: float = 0.5  # share of an activation's range that goes into the weights

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Produced:
    """Channels `start:stop` of what a normalisation with a gain, or a linear layer, gives."""

    layer: nn.Module
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """Input channels `start:stop` of a linear layer or an ungrouped convolution."""

    layer: nn.Linear | nn.Conv1d | Conv1D
    start: int
    stop: int


def scales(activation_max: Tensor, weight_max: Tensor, settings: Settings) -> Tensor:
    """s (channels,) from max|X_j| and max|W_:,j|, both (channels,); a dead channel keeps 1."""
    alive = (activation_max > 0) & (weight_max > 0)
    above = activation_max.clamp(min=LEAST) ** settings.alpha
    below = weight_max.clamp(min=LEAST) ** (1 - settings.alpha)
    return torch.where(alive, (above / below).clamp(min=LEAST), torch.ones_like(above))


def smooth(
    producers: Sequence[Produced],
    consumers: Sequence[Consumed],
    activation_max: Tensor,
    settings: Settings,
) -> Tensor:
    """Rescale, in place, channels that all `producers` give and all `consumers` read.

    Producers whose outputs are added together share their scales; everything that reads any of
    them must be among the consumers, or the function changes. `activation_max` (channels,) is
    max|X_j| of what is quantized. Returns the scales s (channels,).
    """
    largest = torch.stack([_columns(item).abs().amax(dim=(0, 2)) for item in consumers]).amax(0)
    s = scales(activation_max.to(largest.dtype), largest, settings)
    rescale(producers, consumers, s)
    return s


@torch.no_grad()
def rescale(producers: Sequence[Produced], consumers: Sequence[Consumed], s: Tensor) -> None:
    """Divide what is produced by s (channels,) and multiply the weights that read it, in place."""
    for source in producers:
        for tensor in _outputs(source):
            tensor /= s
    for sink in consumers:
        _columns(sink).mul_(s[:, None])


def _outputs(item: Produced) -> list[Tensor]:
    """What makes the channels, views (..., channels): gain or rows of a weight, and offset."""
    weight, bias = item.layer.weight, getattr(item.layer, "bias", None)
    assert isinstance(weight, Tensor)
    made = weight.t() if isinstance(item.layer, nn.Linear) else weight
    return [each[..., item.start : item.stop] for each in (made, bias) if isinstance(each, Tensor)]


def _columns(item: Consumed) -> Tensor:
    """The weights that read the channels, a view (outputs, channels, taps)."""
    weight = item.layer.weight.detach()
    weight = weight.t() if isinstance(item.layer, Conv1D) else weight
    weight = weight[:, :, None] if weight.ndim == 2 else weight
    return weight[:, item.start : item.stop]

"""What calibration shows of an ECAPA-TDNN, and the smoothing that follows from it.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language
Models", arXiv 2310.06927, section 3.4: activation ranges, moments, Hessians; smoothing
(SmoothQuant, Xiao et al., ICML 2023) of every set of channels that are added together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldcrest.kernels.quantization import smoothing
from goldcrest.kernels.quantization.calibration import MinMax, Moments, Percentile
from goldcrest.kernels.sparsity.hessian import HessianAccumulator, layer_inputs
from goldcrest.kernels.speaker.ecapa_tdnn import ConvReluNorm, EcapaTdnn, SERes2Block
from goldcrest.kernels.speaker.pooling import length_mask

if TYPE_CHECKING:
    from goldcrest.kernels.quantization.quantize_ecapa import Settings

Batch = tuple[Tensor, Tensor | None]
"""Features (B, F, T) and lengths (B,) or None."""


class Seen:
    """What one convolution (or the last layer) reads over all calibration batches."""

    def __init__(self, slices: int, settings: Settings, hessian: bool) -> None:
        self.slices = slices  # parts of the channels that have a grid of their own
        self.ranges: list[MinMax | Percentile] = [
            Percentile(settings.percentile) if settings.ranges == "percentile" else MinMax()
            for _ in range(slices)
        ]
        self.extremes = MinMax()
        self.moments = Moments()
        self.low: Tensor | None = None  # (D,) smallest value of each channel
        self.high: Tensor | None = None
        self.hessian = HessianAccumulator() if hessian else None

    def observe(self, layer: nn.Linear | nn.Conv1d, x: Tensor, mask: Tensor | None) -> None:
        """Take a batch (B, D, T), or (B, D) of a linear layer; `mask` (B, T) marks real frames."""
        frames = x if x.ndim == 2 else x.transpose(1, 2).flatten(0, 1)
        if mask is not None and x.ndim == 3:
            frames = frames[mask.flatten() != 0]
        for observer, part in zip(self.ranges, frames.chunk(self.slices, dim=1), strict=True):
            observer.observe(part)
        self.extremes.observe(frames)
        self.moments.observe(frames)
        low, high = frames.amin(dim=0), frames.amax(dim=0)
        self.low = low if self.low is None else self.low.minimum(low)
        self.high = high if self.high is None else self.high.maximum(high)
        if self.hessian is not None:
            self.hessian.add(layer_inputs(layer, x, mask))

    def largest(self) -> Tensor:
        """max|x| of each channel (D,)."""
        assert self.low is not None
        assert self.high is not None
        return self.low.abs().maximum(self.high.abs())


def _layers(model: EcapaTdnn) -> dict[str, tuple[nn.Linear | nn.Conv1d, int, int | None]]:
    """Layers to observe: name -> (layer, slices with their own grid, channels looked at)."""
    found: dict[str, tuple[nn.Linear | nn.Conv1d, int, int | None]] = {
        "enter": (model.enter.conv, 1, None)
    }
    for i, block in enumerate(blocks(model)):
        found[f"layers.{i}.enter"] = (block.enter.conv, 1, None)
        for k, group in enumerate(groups(block)):
            found[f"layers.{i}.res2.{k}"] = (group.conv, 1, None)
        found[f"layers.{i}.leave"] = (block.leave.conv, 1, None)
    found["aggregate"] = (model.aggregate, len(model.layers), None)
    # The attention reads [h; mean; deviation]; mean and deviation are a vector per utterance.
    found["pooling.reduce"] = (model.pooling.reduce, 1, model.settings.mfa_channels)
    found["pooling.expand"] = (model.pooling.expand, 1, None)
    found["embed"] = (model.embed, 1, None)
    return found


def observe(
    model: EcapaTdnn, batches: Sequence[Batch], settings: Settings, *, hessians: bool
) -> dict[str, Seen]:
    """Run the calibration batches and look at every layer's input, padded frames left out."""
    layers = _layers(model)
    seen = {name: Seen(slices, settings, hessians) for name, (_, slices, _) in layers.items()}
    mask: Tensor | None = None

    def look(name: str, x: Tensor) -> None:
        layer, _, channels = layers[name]
        if channels is not None:
            x = x[:, :channels]
        seen[name].observe(layer, x.detach(), mask)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        for name, (layer, _, _) in layers.items()
    ]
    try:
        with torch.no_grad():
            for features, lengths in batches:
                mask = None if lengths is None else length_mask(lengths, features.shape[2])[:, 0]
                model(features, lengths)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def smooth_ecapa(model: EcapaTdnn, seen: dict[str, Seen], settings: Settings) -> None:
    """Smooth every set of channels that are added together, with all that reads them."""
    rule = smoothing.Settings(alpha=settings.alpha)
    produced, consumed = smoothing.Produced, smoothing.Consumed
    channels, scale = model.settings.channels, model.settings.scale
    width = channels // scale
    stream_from = [produced(layer=model.enter.norm, start=0, stop=channels)]
    stream_to = []
    stream_max = []
    for i, block in enumerate(blocks(model)):
        stream_from.append(produced(layer=block.leave.norm, start=0, stop=channels))
        stream_to += [
            consumed(layer=block.enter.conv, start=0, stop=channels),
            consumed(layer=block.gate.squeeze, start=0, stop=channels),
            consumed(layer=model.aggregate, start=i * channels, stop=(i + 1) * channels),
        ]
        stream_max.append(seen[f"layers.{i}.enter"].largest())
        leave_max = seen[f"layers.{i}.leave"].largest()
        for k in range(scale):
            here, before = slice(k * width, (k + 1) * width), slice((k - 1) * width, k * width)
            sources = [produced(layer=block.enter.norm, start=here.start, stop=here.stop)]
            sinks = []
            if k < scale - 1:
                sinks.append(consumed(layer=groups(block)[k].conv, start=0, stop=width))
                largest = seen[f"layers.{i}.res2.{k}"].largest()
            else:
                sinks.append(consumed(layer=block.leave.conv, start=here.start, stop=here.stop))
                largest = leave_max[here]
            if 0 < k < scale - 1:
                norm = groups(block)[k - 1].norm
                sources.append(produced(layer=norm, start=0, stop=width))
                sinks.append(consumed(layer=block.leave.conv, start=before.start, stop=before.stop))
            smoothing.smooth(sources, sinks, largest, rule)
        last = slice((scale - 2) * width, (scale - 1) * width)
        smoothing.smooth(
            [produced(layer=groups(block)[-1].norm, start=0, stop=width)],
            [consumed(layer=block.leave.conv, start=last.start, stop=last.stop)],
            leave_max[last],
            rule,
        )
    stream_max += list(seen["aggregate"].largest().chunk(len(model.layers)))
    smoothing.smooth(stream_from, stream_to, torch.stack(stream_max).amax(dim=0), rule)
    wide = 2 * model.settings.mfa_channels
    smoothing.smooth(
        [produced(layer=model.pooling_norm, start=0, stop=wide)],
        [consumed(layer=model.embed, start=0, stop=wide)],
        seen["embed"].largest(),
        rule,
    )


def blocks(model: EcapaTdnn) -> list[SERes2Block]:
    """The SE-Res2 blocks of the network, first to last."""
    return [block for block in model.layers if isinstance(block, SERes2Block)]


def groups(block: SERes2Block) -> list[ConvReluNorm]:
    """The convolutions of a block's Res2 part, in the order of its chunks of channels."""
    return [group for group in block.res2.groups if isinstance(group, ConvReluNorm)]

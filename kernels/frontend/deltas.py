"""Delta features: regression slopes over neighbouring frames.

Source: Kaldi `feat/feature-functions.cc` (DeltaFeatures). One order is the regression

    d[t] = sum_{n=-w..w} n x[t + n] / sum_n n^2

and higher orders use the same weights convolved with themselves, *then* applied once, so that
frames beyond the edges are copies of the first and last frame at every order.

    T frames   C coefficients   O order
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_deltas", "add_deltas_reference", "delta_weights"]


def delta_weights(order: int, window: int) -> list[Tensor]:
    """Weights of orders 0..`order`: entry o is (2 o w + 1,) float64, centred."""
    if order < 0 or window < 1:
        raise ValueError(f"order must be >= 0 and window >= 1, not {order} and {window}")
    slope = torch.arange(-window, window + 1, dtype=torch.float64)
    slope = slope / slope.square().sum()
    weights = [torch.ones(1, dtype=torch.float64)]
    for _ in range(order):
        last = weights[-1]
        longer = torch.zeros(last.shape[0] + 2 * window, dtype=torch.float64)
        for n, value in enumerate(slope):
            longer[n : n + last.shape[0]] += value * last
        weights.append(longer)
    return weights


def add_deltas(features: Tensor, *, order: int = 2, window: int = 3) -> Tensor:
    """Append deltas up to `order`: (T, C) -> (T, (order + 1) C), statics first.

    Args:
        features: (T, C) float, one utterance without padding.
        order: 2 appends deltas and delta-deltas.
        window: w, frames on each side of the regression of one order.

    Raises:
        ValueError: not a matrix, order < 0 or window < 1.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (frames, coefficients), not {tuple(features.shape)}")
    weights = delta_weights(order, window)
    if features.shape[0] == 0:
        return features.new_zeros((0, features.shape[1] * (order + 1)))
    reach = order * window
    padded = torch.cat([features[:1].expand(reach, -1), features, features[-1:].expand(reach, -1)])
    views = padded.unfold(0, 2 * reach + 1, 1)  # (T, C, 2 reach + 1)
    kernel = torch.zeros(2 * reach + 1, order + 1, dtype=torch.float64)
    for o, weight in enumerate(weights):
        side = o * window
        kernel[reach - side : reach + side + 1, o] = weight
    stacked = views @ kernel.to(features)  # (T, C, order + 1)
    return stacked.transpose(1, 2).reshape(features.shape[0], -1)


def add_deltas_reference(features: Tensor, *, order: int = 2, window: int = 3) -> Tensor:
    """Plain twin of `add_deltas`: frame by frame with clamped indices."""
    frames, coefficients = features.shape
    out = torch.zeros(frames, coefficients * (order + 1), dtype=features.dtype)
    for o, weight in enumerate(delta_weights(order, window)):
        side = o * window
        for t in range(frames):
            for n in range(-side, side + 1):
                neighbour = features[min(max(t + n, 0), frames - 1)]
                out[t, o * coefficients : (o + 1) * coefficients] += weight[n + side] * neighbour
    return out

"""The clustering network: an MLP D - S - S - C with batch normalisation.

Source: Hu et al. 2017 (IMSAT), section 4.1: Linear -> BatchNorm -> ReLU, twice, then Linear; the
softmax is outside. Hidden weights start at N(0, (0.1/sqrt(fan_in))^2), output weights at
N(0, (1e-4/sqrt(fan_in))^2), so that training starts from almost uniform predictions:
H(Y) = H(Y|X) = log C and no mutual information.

N utterances, B batch, D input dimensions, S hidden units, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, starmap
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from goldcrest.kernels.clustering.parallel import mean_over_workers, workers


class BatchNorm(nn.Module):
    """Batch normalisation over all workers' rows that can leave its running statistics alone."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        """`size` S columns; `momentum` is the share of a batch in the running statistics."""
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Tensor, update_statistics: bool = True) -> Tensor:
        """(B, S) -> (B, S); in training by the batch's statistics, else by the running ones."""
        if not self.training:
            mean, variance = self.running_mean, self.running_var
            return batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        mean, variance = batch_moments(x)
        if update_statistics:
            with torch.no_grad():
                rows = len(x) * workers()
                unbiased = variance * (rows / max(rows - 1, 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        if workers() == 1:
            return batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (S,) of the columns of x (B, S) over the rows of all workers."""
    mean = mean_over_workers(x.mean(dim=0))
    return mean, mean_over_workers((x - mean).square().mean(dim=0))


class HiddenLayer(nn.Module):
    """Linear -> BatchNorm -> ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """From `inputs` to `outputs` units."""
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor, update_statistics: bool = True) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return self.norm(self.linear(x), update_statistics).relu()


class Mlp(nn.Module):
    """D - S - ... - S - C; `forward` gives logits."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        """`inputs` D, `hidden` the sizes S of the hidden layers, `outputs` C."""
        super().__init__()
        sizes = pairwise([inputs, *hidden])
        self.hidden = cast("Sequence[HiddenLayer]", nn.ModuleList(starmap(HiddenLayer, sizes)))
        self.output = nn.Linear(hidden[-1], outputs)
        for layer in self.hidden:
            _start(layer.linear, 0.1)
        _start(self.output, 1e-4)

    def forward(self, x: Tensor, update_statistics: bool = True) -> Tensor:
        """x (B, D) -> logits (B, C); `update_statistics=False` keeps the running statistics."""
        for layer in self.hidden:
            x = layer(x, update_statistics)
        return self.output(x)


def _start(layer: nn.Linear, scale: float) -> None:
    nn.init.normal_(layer.weight, std=scale / layer.in_features**0.5)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def set_population_statistics(model: Mlp, x: Tensor, *, chunk: int = 8192) -> None:
    """Replace the running statistics by those of all rows of x (N, D) ("precise BN").

    Running averages lag behind the weights, and stale ones make the arg max of eval mode
    degenerate. Layer by layer, so that each layer sees inputs already normalised by the exact
    statistics of the layers below; two-pass moments in float64.
    """
    training = model.training
    model.eval()
    for depth, layer in enumerate(model.hidden):
        place = layer.linear.weight.device
        total = torch.zeros(layer.linear.out_features, dtype=torch.float64, device=place)
        squares = torch.zeros_like(total)
        for block in x.split(chunk):
            total += _before_norm(model, block, depth).double().sum(dim=0)
        mean = total / len(x)
        for block in x.split(chunk):
            squares += (_before_norm(model, block, depth).double() - mean).square().sum(dim=0)
        layer.norm.running_mean.copy_(mean)
        layer.norm.running_var.copy_(squares / len(x))
    model.train(training)


def _placed(model: Mlp, x: Tensor) -> Tensor:
    """x on the device and in the precision of the model."""
    return x.to(model.output.weight)


def _before_norm(model: Mlp, x: Tensor, depth: int) -> Tensor:
    x = _placed(model, x)
    for layer in model.hidden[:depth]:
        x = layer(x)
    return model.hidden[depth].linear(x)


@torch.no_grad()
def predict_logits(model: Mlp, x: Tensor, *, chunk: int = 8192) -> Tensor:
    """Logits (N, C) float32 of x (N, D) in eval mode, by chunks, where x is."""
    training = model.training
    model.eval()
    logits = [model(_placed(model, block)).float().to(x.device) for block in x.split(chunk)]
    model.train(training)
    return torch.cat(logits)

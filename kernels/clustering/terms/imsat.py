"""Mutual information between input and cluster, the discriminative core of IMSAT and CIMC.

Source: Hu et al. 2017 (IMSAT); Fathan & Alam 2025, equations 10.2-10.4:

    H(Y)   = h(mean_i p(.|x_i))          marginal entropy, maximised: use all clusters
    H(Y|X) = mean_i h(p(.|x_i))          conditional entropy, minimised: be sure of each sample
    L      = R_SAT + lambda (H(Y|X) - mu H(Y))

mu = 1 is plain mutual information, free of any belief about cluster sizes; mu > 1 asks for equal
sizes. H(Y) is not a mean over samples, so a batch cannot be cut into micro-batches naively:
`two_pass_backward` gives the exact gradient of the whole batch from micro-batches, because
dH(Y) = -sum_c log(pbar_c) dpbar_c (the +1 of the product rule cancels: sum_c dpbar_c = 0) is linear
in the predictions once pbar is known.

B batch, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from goldcrest.kernels.clustering.parallel import mean_over_workers
from goldcrest.kernels.clustering.terms.divergence import full_precision

_TINY = 1e-8
"""Added inside the logarithm of every entropy (the spec's h): log 0 stays finite."""


def entropy(p: Tensor) -> Tensor:
    """h(p) = -sum_c p_c log(p_c + 1e-8) along the last dimension, nats."""
    return -(p * (p + _TINY).log()).sum(dim=-1)


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Marginal H(Y) and conditional H(Y|X) of logits (B, C), nats, over all workers' rows.

    0 <= H(Y|X) <= H(Y) <= log C up to the 1e-8 of `entropy`. H(Y|X) is this worker's own mean,
    whose mean over the workers is the whole batch's; H(Y) is the whole batch's everywhere.
    """
    p = full_precision(logits).softmax(dim=1)
    return entropy(mean_over_workers(p.mean(dim=0))), entropy(p).mean()


def information_loss(logits: Tensor, *, weight: float, mu: float) -> Tensor:
    """lambda (H(Y|X) - mu H(Y)) of logits (B, C); `weight` is lambda. Equation 10.2 less R_SAT."""
    marginal, conditional = entropies(logits)
    return weight * (conditional - mu * marginal)


def marginal_entropy_slope(mean_prediction: Tensor) -> Tensor:
    """dH(Y)/dpbar (C,) of h at pbar (C,), the 1e-8 of `entropy` included."""
    p = mean_prediction
    return -(p + _TINY).log() - p / (p + _TINY)


def two_pass_backward(
    predict: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], *, weight: float, mu: float
) -> Tensor:
    """Add the gradient of the whole batch's information loss, one micro-batch in memory at a time.

    `predict` gives logits (b, C) of a chunk (b, D) and must give the same ones twice (batch
    normalisation in eval mode, or by micro-batch). First pass, without gradients: pbar of all
    chunks. Second pass: the linear surrogate -mu * slope . p of each chunk, plus its conditional
    entropy, each chunk weighted by its share of the rows. Gradients are added to the `.grad` of
    the parameters; returns the loss (scalar, detached). Twin: `one_pass_backward`.
    """
    rows = sum(len(chunk) for chunk in chunks)
    with torch.no_grad():
        mean = sum(full_precision(predict(chunk)).softmax(dim=1).sum(dim=0) for chunk in chunks)
        assert isinstance(mean, Tensor)
        mean = mean_over_workers(mean / rows)
        slope = marginal_entropy_slope(mean)
    conditional = mean.new_zeros(())
    for chunk in chunks:
        p = full_precision(predict(chunk)).softmax(dim=1)
        own = entropy(p).sum() / rows
        surrogate = (p @ slope).sum() / rows
        (weight * (own - mu * surrogate)).backward()
        conditional += own.detach()
    return weight * (conditional - mu * entropy(mean))


def one_pass_backward(
    predict: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], *, weight: float, mu: float
) -> Tensor:
    """The plain twin of `two_pass_backward`: all chunks in one graph."""
    logits = torch.cat([predict(chunk) for chunk in chunks])
    loss = information_loss(logits, weight=weight, mu=mu)
    loss.backward()
    return loss.detach()

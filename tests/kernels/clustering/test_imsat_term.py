"""Entropies and the information loss: bounds, golden values, the two-pass gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from goldcrest.kernels.clustering.terms import imsat
from goldcrest.kernels.clustering.terms.divergence import cross_entropy, kl_divergence

# Logits of the specification, section 7.
GOLDEN = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [2.0, 0, 0]], dtype=torch.float64)


def test_golden_entropies() -> None:
    marginal, conditional = imsat.entropies(GOLDEN)
    assert float(conditional) == pytest.approx(0.665573, abs=1e-6)
    assert float(marginal) == pytest.approx(1.070951, abs=1e-6)
    assert float(marginal - conditional) == pytest.approx(0.405378, abs=1e-6)


def test_golden_information_loss() -> None:
    loss = imsat.information_loss(GOLDEN, weight=0.5, mu=3.5)
    assert float(loss) == pytest.approx(-1.541377, abs=1e-6)


@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 30), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_entropies_are_bounded(rows: int, clusters: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = scale * torch.randn(rows, clusters, dtype=torch.float64)
    marginal, conditional = (float(value) for value in imsat.entropies(logits))
    slack = 1e-6  # the 1e-8 inside the logarithm
    assert -slack <= conditional <= marginal + slack
    assert marginal <= math.log(clusters) + slack
    loss = float(imsat.information_loss(logits, weight=0.5, mu=3.5))
    assert loss >= -0.5 * 3.5 * math.log(clusters) - slack


def test_uniform_predictions() -> None:
    # R_SAT = 0 and L = lambda (1 - mu) log C.
    logits = torch.zeros(8, 5, dtype=torch.float64)
    assert float(kl_divergence(logits, logits)) == 0
    loss = float(imsat.information_loss(logits, weight=0.5, mu=3.5))
    assert loss == pytest.approx(0.5 * (1 - 3.5) * math.log(5), abs=1e-6)


def test_perfect_balanced_predictions_reach_the_lower_bound() -> None:
    logits = 100 * torch.eye(5, dtype=torch.float64).repeat(3, 1)
    loss = float(imsat.information_loss(logits, weight=0.5, mu=3.5))
    assert loss == pytest.approx(-0.5 * 3.5 * math.log(5), abs=1e-6)


def test_kl_and_cross_entropy_differ_by_the_entropy_of_the_target_and_share_gradients() -> None:
    torch.manual_seed(0)
    target = torch.randn(6, 4, dtype=torch.float64)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    kl, ce = kl_divergence(target, logits), cross_entropy(target, logits)
    entropy = imsat.entropies(target)[1]
    assert (ce - kl).item() == pytest.approx(entropy.item(), abs=1e-6)
    (of_kl,) = torch.autograd.grad(kl, logits)
    (of_ce,) = torch.autograd.grad(ce, logits)
    torch.testing.assert_close(of_kl, of_ce)


def test_entropies_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = (10 * GOLDEN).to(torch.bfloat16)
    assert imsat.entropies(logits)[0].dtype == torch.float32


@pytest.mark.parametrize("cuts", [[24], [8, 8, 8], [5, 9, 10]])
def test_two_pass_gradient_equals_one_pass(cuts: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    chunks = (2 * torch.randn(24, 6, dtype=torch.float64)).split(cuts)
    results = []
    for backward in (imsat.one_pass_backward, imsat.two_pass_backward):
        model.zero_grad()
        loss = backward(model, chunks, weight=0.5, mu=3.5)
        results.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)

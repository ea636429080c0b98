"""The adversarial direction: its length, gradients, batch statistics, and limit."""

from __future__ import annotations

import torch
from torch import nn

from goldcrest.kernels.clustering.network import Mlp
from goldcrest.kernels.clustering.terms.divergence import kl_divergence
from goldcrest.kernels.clustering.terms.vat import adversarial_perturbation, unit_rows


def _network(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    model = Mlp(6, (16, 16), 5)
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model


def _quiet(model: Mlp):
    return lambda x: model(x, update_statistics=False)


def test_rows_have_the_asked_length_and_no_gradient() -> None:
    model = _network()
    x, radius = torch.randn(12, 6), torch.rand(12)
    logits = model(x)
    r = adversarial_perturbation(
        _quiet(model), x, logits, torch.randn(12, 6), radius, xi=0.1, iterations=2
    )
    torch.testing.assert_close(r.norm(dim=1), radius)
    assert not r.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_running_statistics_stay_bit_identical() -> None:
    model = _network()
    x = torch.randn(12, 6)
    logits = model(x)
    before = {name: value.clone() for name, value in model.named_buffers()}
    adversarial_perturbation(
        _quiet(model), x, logits, torch.randn(12, 6), torch.ones(12), xi=0.1, iterations=3
    )
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(x)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_it_hurts_more_than_random_pushes_of_the_same_length() -> None:
    model = _network().eval()
    x, radius = torch.randn(64, 6), torch.full((64,), 0.3)
    logits = model(x).detach()
    gain = []
    for seed in range(5):
        torch.manual_seed(seed)
        start = torch.randn(64, 6)
        push = adversarial_perturbation(model, x, logits, start, radius, xi=0.1, iterations=1)
        random = radius[:, None] * unit_rows(start)
        gain.append(
            kl_divergence(logits, model(x + push)) - kl_divergence(logits, model(x + random))
        )
    assert float(torch.stack(gain).detach().min()) > 0


def test_many_iterations_find_the_top_eigenvector_of_a_linear_softmax() -> None:
    # To second order the KL is r' W' (diag p - p p') W r / 2.
    torch.manual_seed(1)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    start = torch.randn(1, 4, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    d = adversarial_perturbation(layer, x, layer(x), start, one, xi=1e-4, iterations=200)
    p = layer(x).softmax(dim=1)[0].detach()
    fisher = layer.weight.T @ (p.diag() - p.outer(p)) @ layer.weight
    top = torch.linalg.eigh(fisher.detach()).eigenvectors[:, -1]
    torch.testing.assert_close((d[0] @ top).abs(), one[0], atol=1e-6, rtol=0)


def test_rows_without_gradient_keep_their_direction() -> None:
    x, start = torch.randn(3, 4), torch.randn(3, 4)
    constant = nn.Linear(4, 2)
    nn.init.zeros_(constant.weight)
    r = adversarial_perturbation(
        constant, x, constant(x), start, torch.ones(3), xi=0.1, iterations=2
    )
    torch.testing.assert_close(r, unit_rows(start))

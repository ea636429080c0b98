"""Logit mixup: golden mixes, and the cases where its loss is exactly zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from goldcrest.kernels.clustering.network import Mlp
from goldcrest.kernels.clustering.terms.mixup import mix, mixed_target, mixup_loss

SPACES = ["logits", "probabilities"]


@pytest.mark.parametrize(
    ("space", "expected"),
    # The specification, section 3.5: logits (2,0,0) and (0,4,0), alpha = 0.25.
    [("logits", [0.072521, 0.883492, 0.043986]), ("probabilities", [0.209998, 0.750124, 0.039878])],
)
def test_golden_mixes(space, expected) -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 4.0, 0]], dtype=torch.float64)
    target = mixed_target(logits, torch.tensor([1, 0]), torch.full((2,), 0.25), space=space)
    torch.testing.assert_close(
        target.softmax(dim=1)[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(10, 4, dtype=torch.float64)
    return x, torch.randperm(10), torch.rand(10, dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
def test_zero_for_share_one_and_for_identical_partners(space) -> None:
    x, partner, share = _case()
    model = Mlp(4, (8,), 3).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    logits = model(x)
    alone = mixup_loss(model, x, logits, partner, torch.ones_like(share), space=space)
    own = mixup_loss(model, x, logits, torch.arange(10), share, space=space)
    assert abs(float(alone.detach())) < 1e-12
    assert abs(float(own.detach())) < 1e-12


def test_zero_for_a_linear_network_in_logit_space_only() -> None:
    x, partner, share = _case()
    layer = nn.Linear(4, 3).double()
    assert abs(float(mixup_loss(layer, x, layer(x), partner, share).detach())) < 1e-12
    assert (
        float(mixup_loss(layer, x, layer(x), partner, share, space="probabilities").detach()) > 1e-4
    )


def test_the_target_carries_no_gradient_unless_asked() -> None:
    x, partner, share = _case()
    logits = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 3).double()
    mixup_loss(layer, x, logits, partner, share).backward()
    assert logits.grad is None
    mixup_loss(layer, x, logits, partner, share, fixed_target=False).backward()
    assert float(logits.grad.abs().max()) > 0


def test_renormalised_mixes_have_unit_length() -> None:
    x, partner, share = _case()
    seen = []
    mixup_loss(
        lambda rows: seen.append(rows) or rows[:, :3], x, x[:, :3], partner, share, renormalise=True
    )
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert not torch.allclose(mix(x, partner, share).norm(dim=1), torch.ones(10).double())


def test_probabilities_that_underflow_stay_finite() -> None:
    # softmax of a difference of 800 is 0 in any precision; a logarithm of it would be -inf.
    logits = torch.tensor([[800.0, 0.0], [799.0, 0.0]], requires_grad=True)
    partner, share = torch.tensor([1, 0]), torch.tensor([0.3, 1.0])
    target = mixed_target(logits, partner, share, space="probabilities")
    assert bool(target.isfinite().all())
    x = torch.eye(2)
    loss = mixup_loss(lambda rows: rows * 5, x, logits, partner, share, space="probabilities")
    loss_through = mixup_loss(
        lambda rows: rows * 5, x, logits, partner, share, space="probabilities", fixed_target=False
    )
    loss_through.backward()
    assert bool(loss.isfinite())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())

"""SupCon and InfoNCE: golden values, their plain twins, guards against lonely anchors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.clustering.terms.contrast import (
    log_sum_exp_others,
    log_sum_exp_others_reference,
)
from goldcrest.kernels.clustering.terms.infonce import (
    Distance,
    infonce_loss,
    infonce_loss_reference,
)
from goldcrest.kernels.clustering.terms.supcon import supcon_loss, supcon_loss_reference


def _wide(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rows", "labels", "expected"),
    # The specification, section 7: anchors 0.437488 and 0.798139 of the first, and a second case.
    [
        ([[1, 0], [0.6, 0.8], [0, 1]], [0, 0, 1], 0.617813),
        (
            [[2, 0, 1], [1, 1, 0], [0, 3, 1], [1, 2, 2], [0, 1, 4]],
            [0, 0, 1, 1, 2],
            1.238219,
        ),
    ],
)
def test_supcon_golden_values(rows: list, labels: list, expected: float) -> None:
    loss = supcon_loss(_wide(rows), torch.tensor(labels))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@given(st.integers(2, 14), st.integers(1, 6), st.integers(1, 5), st.floats(0.2, 2), st.integers(0))
@settings(max_examples=25, deadline=None)
def test_supcon_equals_the_double_loop(
    rows: int, classes: int, block: int, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed % 2**31)
    logits = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    results = []
    for loss in (
        supcon_loss(logits, labels, temperature=temperature, block=block),
        supcon_loss_reference(logits, labels, temperature=temperature),
    ):
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_supcon_does_not_depend_on_the_order_of_rows() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5, dtype=torch.float64), torch.randint(4, (20,))
    order = torch.randperm(20)
    torch.testing.assert_close(
        supcon_loss(logits, labels), supcon_loss(logits[order], labels[order])
    )


@pytest.mark.parametrize("block", [1, 3, 64])
def test_supcon_of_lonely_anchors_is_zero_without_nan(block: int) -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    loss = supcon_loss(logits, torch.arange(6), block=block)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(6, 4))


def test_supcon_labels_are_the_arg_max_by_default() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 3)
    torch.testing.assert_close(supcon_loss(logits), supcon_loss(logits, logits.argmax(dim=1)))


def test_supcon_mean_over_all_anchors() -> None:
    # Two of three anchors have a positive.
    logits, labels = _wide([[1, 0], [0.6, 0.8], [0, 1]]), torch.tensor([0, 0, 1])
    mean = supcon_loss(logits, labels, anchor_mean="all")
    torch.testing.assert_close(mean, supcon_loss(logits, labels) * 2 / 3)


def test_supcon_of_a_zero_row_is_finite() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    supcon_loss(logits, torch.zeros(4, dtype=torch.int64)).backward()
    assert bool(logits.grad.isfinite().all())


def test_infonce_golden_value() -> None:
    # The specification, section 7.
    loss = infonce_loss(_wide([[1, 0], [0, 1]]), _wide([[1, 0.5], [-0.5, 1]]))
    assert float(loss) == pytest.approx(0.614982, abs=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "kl"])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_infonce_equals_the_loop(block: int, distance: Distance) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 3, dtype=torch.float64).requires_grad_()
    results = []
    for loss in (
        infonce_loss(a, b, temperature=0.3, distance=distance, block=block),
        infonce_loss_reference(a, b, temperature=0.3, distance=distance),
    ):
        results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 5, 50])
def test_streamed_log_sum_exp_equals_the_matrix_for_extreme_scores(block: int) -> None:
    torch.manual_seed(0)
    anchors = torch.randn(5, 3, dtype=torch.float64).mul(20).requires_grad_()
    keys = torch.randn(9, 3, dtype=torch.float64).mul(20).requires_grad_()
    own = torch.tensor([0, 8, 4, 2, 1])
    weights = torch.randn(5, dtype=torch.float64)
    results = []
    for value in (
        log_sum_exp_others(anchors, keys, own, temperature=0.5, block=block),
        log_sum_exp_others_reference(anchors, keys, own, temperature=0.5),
    ):
        gradients = torch.autograd.grad((value * weights).sum(), (anchors, keys))
        results.append((value.detach(), *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)

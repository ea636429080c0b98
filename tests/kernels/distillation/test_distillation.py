"""SquareHead, logit and plain feature distillation: the spec's properties 6 and 7."""

from __future__ import annotations

import math

import pytest
import torch

from goldcrest.kernels.distillation import feature_mse, logit_kd, squarehead

EXACT = squarehead.Settings(epsilon=0.0)


def blocks(seed: int = 0, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [10.0**k * torch.randn(2, 7, 5, generator=generator) for k in range(count)]


def test_identical_features_cost_nothing() -> None:
    assert squarehead.loss(blocks(), blocks(), None, EXACT) == 0


def test_a_silent_student_costs_one_per_block_whatever_its_scale() -> None:
    """Summed over blocks, not averaged."""
    student = [torch.zeros_like(block) for block in blocks()]
    assert float(squarehead.loss(blocks(), student, None, EXACT)) == pytest.approx(3.0)
    assert float(feature_mse.loss(blocks(), student, None, feature_mse.Settings())) > 1000


def test_scaling_teacher_and_student_together_changes_nothing() -> None:
    loss = squarehead.loss(blocks(0), blocks(1), None, EXACT)
    scaled = squarehead.loss(
        [100 * b for b in blocks(0)], [100 * b for b in blocks(1)], None, EXACT
    )
    torch.testing.assert_close(loss, scaled)


@pytest.mark.parametrize("method", [squarehead, feature_mse])
def test_padding_changes_nothing(method) -> None:
    """Expected: the loss without the padded frames at all; NaN in them has no effect either."""
    mask = torch.tensor([[1.0] * 7, [1.0] * 7])
    padded = torch.nn.functional.pad(mask, (0, 2))
    setting = method.Settings()
    plain = method.loss(blocks(0), blocks(1), None, setting)
    pad = (0, 0, 0, 2)
    teacher = [torch.nn.functional.pad(b, pad, value=float("nan")) for b in blocks(0)]
    student = [torch.nn.functional.pad(b, pad, value=7.0) for b in blocks(1)]
    torch.testing.assert_close(method.loss(teacher, student, padded, setting), plain)


@pytest.mark.parametrize("method", [squarehead, feature_mse])
def test_a_batch_of_padding_alone_costs_nothing(method) -> None:
    """As for cross-entropy and KL; a NaN would end the training."""
    nothing = torch.zeros(2, 7)
    assert method.loss(blocks(0), blocks(1), nothing, method.Settings()) == 0


def test_block_masks_may_differ() -> None:
    """An encoder's mask and a decoder's: the sum of the blocks alone."""
    first, second = torch.ones(2, 7), torch.ones(2, 7)
    second[:, 3:] = 0
    both = squarehead.loss(blocks(0, 2), blocks(1, 2), [first, second], EXACT)
    alone = [
        squarehead.block_loss(t, s, m, 0.0)
        for t, s, m in zip(blocks(0, 2), blocks(1, 2), (first, second), strict=True)
    ]
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_by_hand() -> None:
    """MSE((1, 2), (1, 4)) / MSE((1, 2), 0) = 2 / 2.5."""
    teacher, student = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 4.0]]])
    assert float(squarehead.block_loss(teacher, student, None, 0.0)) == pytest.approx(0.8)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = [torch.randn(1, 2, 3, requires_grad=True)]
    student = [torch.randn(1, 2, 3, requires_grad=True)]
    squarehead.loss(teacher, student, None, EXACT).backward()
    assert teacher[0].grad is None
    assert student[0].grad is not None


def test_equal_logits_have_no_divergence() -> None:
    logits = torch.randn(3, 4, 6)
    loss = logit_kd.loss(logits, logits + 5, None, logit_kd.Settings(temperature=3.0))
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_temperature_one_is_equation_6_1() -> None:
    """Expected: KL(teacher || student) by torch.distributions, averaged over real tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher),
        torch.distributions.Categorical(logits=student),
    )
    expected = divergence[mask == 1].mean()
    torch.testing.assert_close(logit_kd.loss(teacher, student, mask, logit_kd.Settings()), expected)
    student[mask == 0] = 1e4
    torch.testing.assert_close(logit_kd.loss(teacher, student, mask, logit_kd.Settings()), expected)


def test_temperature_keeps_the_size_of_gradients() -> None:
    """tau^2 KL(softmax(z / tau)) tends to var-like 0.5 mean (dz - mean dz)^2 (Hinton, eq. 4)."""
    teacher = torch.tensor([[0.3, -0.1, 0.2, 0.0]])
    student = torch.tensor([[0.1, 0.1, -0.2, 0.3]])
    difference = teacher - student
    limit = 0.5 * (difference - difference.mean()).square().mean()
    loss = logit_kd.loss(teacher, student, None, logit_kd.Settings(temperature=30.0))
    assert float(loss) == pytest.approx(float(limit), rel=1e-2)


def test_entropy_of_known_distributions() -> None:
    """Uniform over 4: log 4; a certain one: 0; masked tokens do not count."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert float(logit_kd.entropy(logits)) == pytest.approx(math.log(4) / 2)
    assert float(logit_kd.entropy(logits, torch.tensor([1, 0]))) == pytest.approx(math.log(4))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="pair up"):
        squarehead.loss(blocks(), blocks()[:2], None, EXACT)
    with pytest.raises(ValueError, match="student's"):
        feature_mse.loss(blocks(0, 1), [torch.zeros(1, 1, 1)], None, feature_mse.Settings())
    with pytest.raises(ValueError, match="temperature"):
        logit_kd.Settings(temperature=0.0)

"""One matrix over the files of kernels/margin, and the golden values of each loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from goldcrest.kernels import margin
from goldcrest.kernels.margin import aam, adaface, am, ce, cosface, ocsoftmax

COSINES = torch.tensor([[0.8, 0.1, -0.2], [0.3, 0.5, 0.4]])
LABELS = torch.tensor([0, 2])


def embeddings_and_labels(count: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(count, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % classes


def head_of(method: str, **changes: float) -> torch.nn.Module:
    torch.manual_seed(1)
    file = margin.load(method)
    return file.Head(8, 5, file.Settings(**changes))


# Specification, section 5 (golden): worked with NumPy from the formulas, not from this code.
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (aam.loss(COSINES, LABELS, aam.Settings(margin=0.1, scale=30)), 2.905196),
        (aam.loss(COSINES, LABELS, aam.Settings(margin=0.2, scale=30)), 4.352173),
        (am.loss(COSINES, LABELS, am.Settings(margin=0.2, scale=30)), 4.501300),
        (am.loss(COSINES, LABELS, am.Settings(margin=0.0, scale=30)), 1.525473),
        (aam.loss(COSINES, LABELS, aam.Settings(margin=0.0, scale=30)), 1.525473),
        (ocsoftmax.loss(COSINES, LABELS, ocsoftmax.Settings()), 9.137389),
    ],
)
def test_golden(found: Tensor, expected: float) -> None:
    assert found.item() == pytest.approx(expected, abs=2e-6)


def test_adaface_golden() -> None:
    # Specification, section 5: norms 10 and 30 under mean 20 and deviation 10.
    settings = adaface.Settings()
    norms = torch.tensor([10.0, 30.0])
    z = adaface.quality(norms, torch.tensor(20.0), torch.tensor(10.0), settings.concentration)
    torch.testing.assert_close(z, torch.tensor([-0.332967, 0.332967]), atol=1e-6, rtol=0)
    assert adaface.loss(COSINES, LABELS, z, settings).item() == pytest.approx(16.480710, abs=1e-5)


def test_every_file_is_a_method() -> None:
    assert margin.methods() == ["aam", "adaface", "am", "ce", "cosface", "ocsoftmax"]
    with pytest.raises(ValueError, match=r"'arc' does not exist; there are: aam, adaface, am"):
        margin.load("arc")
    with pytest.raises(ValueError, match="does not exist"):
        margin.load("_cosine")  # shared by methods, not one itself


@pytest.mark.parametrize("method", margin.methods())
class TestEveryMethod:
    def test_settings_are_frozen_and_keyword_only(self, method: str) -> None:
        settings = margin.load(method).Settings
        with pytest.raises(TypeError):
            settings(1.0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings().scale = 1.0

    def test_loss_is_a_finite_scalar_with_gradients(self, method: str) -> None:
        x, labels = embeddings_and_labels()
        x = x.float().requires_grad_()
        head = head_of(method)
        loss = head(x, labels)
        loss.backward()
        assert loss.shape == () and torch.isfinite(loss)
        assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_logits_rank_the_classes(self, method: str) -> None:
        x, _ = embeddings_and_labels()
        head = head_of(method)
        logits = head.logits(x.float())
        assert logits.shape == (12, 5)
        own = head.weight.detach() * (3.0 / head.weight.detach().norm(dim=1, keepdim=True))
        assert head.logits(own).argmax(dim=1).tolist() == [0, 1, 2, 3, 4]

    def test_permuting_classes_changes_nothing(self, method: str) -> None:
        x, labels = embeddings_and_labels()
        head, permuted = head_of(method), head_of(method)
        order = torch.tensor([3, 0, 4, 1, 2])
        state = head.state_dict()
        moved = {
            name: value[order] if name in ("weight", "bias") else value
            for name, value in state.items()
        }
        permuted.load_state_dict(moved)
        place = torch.argsort(order)  # class k is row place[k] now
        torch.testing.assert_close(head(x.float(), labels), permuted(x.float(), place[labels]))

    def test_half_precision_embeddings_are_scored_in_float32(self, method: str) -> None:
        x, labels = embeddings_and_labels()
        loss = head_of(method).bfloat16()(x.bfloat16(), labels)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)

    def test_embeddings_on_their_centres_and_opposite(self, method: str) -> None:
        # cos = +1 and -1 by rounding: acos and the sine's gradient are infinite there.
        head = head_of(method)
        for sign in (1.0, -1.0):
            x = (sign * 14 * torch.nn.functional.normalize(head.weight.detach())).requires_grad_()
            loss = head(x, torch.arange(5))
            (gradient,) = torch.autograd.grad(loss, x)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()

    def test_one_class_is_refused(self, method: str) -> None:
        file = margin.load(method)
        with pytest.raises(ValueError, match="at least 2 classes"):
            file.Head(8, 1, file.Settings())


@pytest.mark.parametrize("method", ["aam", "am", "cosface", "adaface"])
def test_loss_rises_with_the_margin(method: str) -> None:
    x, labels = embeddings_and_labels()
    losses = [head_of(method, margin=m)(x.float(), labels).item() for m in (0.0, 0.1, 0.2, 0.4)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_without_margin_aam_and_am_are_the_normalised_softmax() -> None:
    x, labels = embeddings_and_labels()
    a, b = (head_of(method, margin=0.0, scale=30.0) for method in ("aam", "am"))
    softmax = torch.nn.functional.cross_entropy(a.logits(x.float()), labels)
    torch.testing.assert_close(a(x.float(), labels), softmax)
    torch.testing.assert_close(b(x.float(), labels), softmax)


def test_cosface_is_am_with_other_settings() -> None:
    assert cosface.Settings() != am.Settings()
    same = am.Settings(scale=64.0, margin=0.4)
    torch.testing.assert_close(
        cosface.loss(COSINES, LABELS, cosface.Settings()), am.loss(COSINES, LABELS, same)
    )


def test_aam_target_rises_with_the_cosine_beyond_pi_minus_m() -> None:
    cosine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    for m in (0.1, 0.5, 1.0):
        logit = aam.target_logit(cosine, m)
        assert (logit.diff() > 0).all()
        inside = cosine > math.cos(math.pi - m)
        angle = cosine.clamp(-1, 1).acos()
        torch.testing.assert_close(
            logit[inside], (angle + m).cos()[inside], atol=5e-4, rtol=0
        )  # the clamp at 1 - 1e-7 is an angle of 4.5e-4


def test_aam_gradients_near_the_ends() -> None:
    # Central differences in float64, off the kink and inside the clamp.
    ends = [-0.99999, -0.9999, -0.9, 0.0, 0.9, 0.9999, 0.99999]
    cosine = torch.tensor(ends, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: aam.target_logit(c, 0.2), cosine, eps=1e-8, atol=1e-4)


def test_adaface_limits() -> None:
    # Paper, section 3.3: z = 0 CosFace, z = -1 ArcFace, z = +1 cos(theta - m) - 2m.
    cosine = torch.linspace(-0.85, 0.85, 50, dtype=torch.float64)
    theta, m = cosine.acos(), 0.4
    for z, expected in (
        (0.0, cosine - m),
        (-1.0, (theta + m).cos()),
        (1.0, (theta - m).cos() - 2 * m),
    ):
        found = adaface.target_cosine_with_margin(cosine, torch.full_like(cosine, z), m)
        torch.testing.assert_close(found, expected)


def test_adaface_averages_follow_the_norms_in_training_only() -> None:
    x, labels = embeddings_and_labels()
    norms = x.norm(dim=1).float()
    head = head_of("adaface")
    head(x.float(), labels)
    # 0.99 of the start (20 and 100) and 0.01 of the batch.
    assert head.norm_mean.item() == pytest.approx(0.99 * 20 + 0.01 * norms.mean().item(), rel=1e-5)
    expected = 0.99 * 100 + 0.01 * norms.std().item()
    assert head.norm_deviation.item() == pytest.approx(expected, rel=1e-5)
    before = head.norm_mean.clone()
    head.eval()(x.float(), labels)
    assert head.norm_mean == before
    head.train()(x[:1].float(), labels[:1])  # one example has no deviation
    assert torch.isfinite(head.norm_deviation)


def test_adaface_sees_the_norm_and_the_others_do_not() -> None:
    x, labels = embeddings_and_labels()
    x[::2] *= 5  # another quality for half of the examples
    for method in margin.methods():
        head = head_of(method).eval()
        if method == "adaface":
            head.norm_mean.fill_(10.0)
            head.norm_deviation.fill_(5.0)
        same = torch.nn.functional.normalize(x.float())
        differs = not torch.allclose(head(x.float(), labels), head(same, labels), rtol=1e-4)
        assert differs == (method in ("adaface", "ce")), method


def test_ocsoftmax_with_one_centre_is_the_original() -> None:
    # Zhang et al. 2021, equation (5), with log1p(exp()) written out.
    settings = ocsoftmax.Settings()
    cosine = torch.tensor([0.95, 0.3, 0.1, 0.7], dtype=torch.float64)
    target = torch.tensor([True, True, False, False])
    sides = torch.tensor([0.9 - 0.95, 0.9 - 0.3, 0.1 - 0.2, 0.7 - 0.2], dtype=torch.float64)
    expected = torch.log1p(torch.exp(20 * sides)).mean()
    torch.testing.assert_close(ocsoftmax.binary_loss(cosine, target, settings), expected)
    # Own centre out of the way (cos = -1 beside an easy target): only one other class is left.
    two = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    pushed = ocsoftmax.loss(two, torch.tensor([0]), settings)
    original = torch.log1p(torch.exp(torch.tensor(20 * (0.3 - 0.2), dtype=torch.float64)))
    own = torch.log1p(torch.exp(torch.tensor(20 * (0.9 - 1.0), dtype=torch.float64)))
    torch.testing.assert_close(pushed, original + own)


def test_ocsoftmax_sum_and_mean_of_negatives() -> None:
    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    rest = [[0.1, -0.2], [0.3, 0.5]]
    own = [softplus(20 * (0.9 - cosine)) for cosine in (0.8, 0.4)]
    away = [[softplus(20 * (cosine - 0.2)) for cosine in row] for row in rest]
    for kind, share in (("sum", 1.0), ("mean", 0.5)):
        settings = ocsoftmax.Settings(negatives=kind)  # type: ignore[arg-type]
        expected = sum(a + share * sum(b) for a, b in zip(own, away, strict=True)) / 2
        found = ocsoftmax.loss(COSINES, LABELS, settings)
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (aam.Settings, {"margin": 2.0}, "margin"),
        (aam.Settings, {"scale": 0.0}, "scale"),
        (am.Settings, {"margin": -0.1}, "margin"),
        (cosface.Settings, {"scale": -1.0}, "scale"),
        (adaface.Settings, {"momentum": 0.0}, "momentum"),
        (adaface.Settings, {"margin": 1.6}, "margin"),
        (adaface.Settings, {"concentration": 0.0}, "concentration"),
        (ocsoftmax.Settings, {"target_margin": 0.1}, "margins"),
        (ocsoftmax.Settings, {"scale": 0.0}, "scale"),
        (ocsoftmax.Settings, {"negatives": "max"}, "joint, sum or mean"),
        (ce.Settings, {"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: type, values: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**values)

"""VICReg's golden values and the augmentation loss."""

from __future__ import annotations

import pytest
import torch

from goldcrest.kernels.clustering.terms import vicreg
from goldcrest.kernels.clustering.terms.augmentation import augmentation_loss

# The specification, section 7.
Z = torch.tensor([[1.0, 2], [3, 0], [2, 4], [0, 1]], dtype=torch.float64)
OTHER = Z + torch.tensor([[0.1, 0], [0, 0.1], [-0.1, 0], [0, -0.1]], dtype=torch.float64)


def test_vicreg_golden_values() -> None:
    assert float(vicreg.invariance(Z, OTHER)) == pytest.approx(0.01)
    assert float(vicreg.variance(Z)) == 0
    assert float(vicreg.variance(OTHER)) == 0
    assert float(vicreg.covariance(Z)) == pytest.approx(0.027778, abs=1e-6)
    assert float(vicreg.covariance(OTHER)) == pytest.approx(0.017778, abs=1e-6)
    assert float(vicreg.vicreg_loss(Z, OTHER)) == pytest.approx(0.032778, abs=1e-6)
    assert float(vicreg.variance(0.1 * Z)) == pytest.approx(0.849719, abs=1e-6)


def test_augmentation_loss_is_the_kl_from_augmented_to_clean() -> None:
    # KL((0.5, 0.5) || (0.75, 0.25)) by hand; the other direction would be 0.1308.
    clean, augmented = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    assert float(augmentation_loss(clean, augmented)) == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize(
    ("fixed", "flows"),
    [("none", (True, True)), ("clean", (False, True)), ("augmented", (True, False))],
)
def test_the_fixed_side_of_the_augmentation_loss_gets_no_gradient(fixed, flows) -> None:
    torch.manual_seed(0)
    clean, augmented = torch.randn(2, 4, 3).requires_grad_().unbind()
    clean.retain_grad()
    augmented.retain_grad()
    augmentation_loss(clean, augmented, fixed=fixed).backward()
    got = (clean.grad is not None, augmented.grad is not None)
    assert got == flows

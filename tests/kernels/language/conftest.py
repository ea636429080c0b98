"""Models that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.language import tiny_models


@pytest.fixture(params=sorted(tiny_models.MODELS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> Any:
    """A seeded model of the architecture, in eval mode."""
    torch.manual_seed(0)
    return tiny_models.MODELS[architecture]().eval()

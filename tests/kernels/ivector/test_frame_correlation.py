"""The correlation time of frames against processes whose correlation is known."""

from __future__ import annotations

import pytest
import torch

from goldcrest.kernels.ivector.frame_correlation import autocorrelation, correlation_time


def autoregressive(rho: float, count: int = 40, frames: int = 1_000) -> list[torch.Tensor]:
    """Utterances of a first-order autoregressive process: correlation rho^k at lag k."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(count, frames, 3, generator=g, dtype=torch.float64)
    x = torch.zeros_like(noise)
    x[:, 0] = noise[:, 0] / (1 - rho**2) ** 0.5
    for t in range(1, frames):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return list(x * torch.tensor([1.0, 100.0, 0.01]) + 5)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_correlation_time_of_a_first_order_process(rho: float) -> None:
    # The geometric series: 1 + 2 sum rho^k = (1 + rho) / (1 - rho).
    expected = (1 + rho) / (1 - rho)
    assert correlation_time(autoregressive(rho)) == pytest.approx(expected, rel=0.06)


def test_autocorrelation_equals_a_naive_loop() -> None:
    utterances = [u[:n] for u, n in zip(autoregressive(0.7, 3), (50, 9, 1), strict=True)]
    found = autocorrelation(utterances, lags=20)
    centred = [u - u.mean(0) for u in utterances[:2]]
    variance = torch.cat(centred).square().mean(0)
    expected = []
    for lag in range(21):
        terms = [(x[lag:] * x[: max(0, len(x) - lag)] / variance).reshape(-1) for x in centred]
        joined = torch.cat(terms)
        expected.append(float(joined.mean()) if joined.numel() else 0.0)
    torch.testing.assert_close(found, torch.tensor(expected).double() / expected[0])


def test_constant_dimensions_are_passed_over() -> None:
    varying = autoregressive(0.5)
    with_constant = [torch.cat([u, torch.ones(len(u), 1).double()], dim=1) for u in varying]
    assert correlation_time(with_constant) == pytest.approx(correlation_time(varying))


@pytest.mark.parametrize(
    "call",
    [
        lambda: autocorrelation([torch.zeros(1, 3)]),
        lambda: autocorrelation([torch.ones(10, 3)]),
        lambda: autocorrelation([torch.randn(10, 3)], lags=0),
    ],
)
def test_wrong_inputs_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"needs|vary|lags"):
        call()

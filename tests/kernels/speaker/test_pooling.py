"""Attentive statistics pooling against its definition written out."""

from __future__ import annotations

import pytest
import torch

from goldcrest.kernels.speaker.pooling import (
    AttentiveStatisticsPooling,
    MaskedBatchNorm1d,
    PoolingSettings,
    length_mask,
    masked_mean,
    plain_statistics,
    weighted_statistics,
)


def pooling(variant: str = "ecapa") -> AttentiveStatisticsPooling:
    torch.manual_seed(0)
    settings = PoolingSettings(channels=6, attention_channels=4, variant=variant)  # type: ignore[arg-type]
    return AttentiveStatisticsPooling(settings).eval()


def test_constant_frames() -> None:
    # The mean is the frame; the deviation is the floor's root, sqrt(1e-4) = 0.01.
    frame = torch.randn(2, 6, 1)
    pooled = pooling()(frame.expand(-1, -1, 15))
    torch.testing.assert_close(pooled[:, :6], frame[:, :, 0])
    torch.testing.assert_close(pooled[:, 6:], torch.full((2, 6), 0.01))


def test_uniform_attention_is_plain_mean_and_deviation() -> None:
    layer = pooling()
    torch.nn.init.zeros_(layer.expand.weight)
    h = torch.randn(3, 6, 25)
    pooled = layer(h)
    torch.testing.assert_close(pooled[:, :6], h.mean(dim=2))
    torch.testing.assert_close(pooled[:, 6:], h.std(dim=2, correction=0))


@pytest.mark.parametrize("variant", ["ecapa", "tao"])
def test_attention_written_out(variant: str) -> None:
    # Specification, section 4, frame by frame and channel by channel in float64.
    layer = pooling(variant).double()
    h = torch.randn(1, 6, 7, dtype=torch.float64)
    w1, b1 = layer.reduce.weight[:, :, 0], layer.reduce.bias
    w2, b2 = layer.expand.weight[:, :, 0], layer.expand.bias
    mean = h[0].mean(dim=1)
    std = (h[0].var(dim=1, correction=0)).sqrt()
    energies = []
    for t in range(7):
        hidden = w1 @ torch.cat([h[0, :, t], mean, std]) + b1
        if layer.norm is not None:  # fresh BatchNorm in eval: divide by sqrt(1 + eps)
            hidden = hidden.relu() / (1 + layer.norm.eps) ** 0.5
        energies.append(w2 @ hidden.tanh() + b2)
    alpha = torch.softmax(torch.stack(energies, dim=1), dim=1)
    mu = (alpha * h[0]).sum(dim=1)
    sigma = ((alpha * h[0] ** 2).sum(dim=1) - mu**2).clamp(min=1e-4).sqrt()
    torch.testing.assert_close(layer(h)[0].double(), torch.cat([mu, sigma]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.attention(h)[0].double(), alpha, atol=1e-6, rtol=1e-5)


def test_attention_is_zero_on_padding_and_sums_to_one() -> None:
    mask = length_mask(torch.tensor([9, 4]), 9)
    alpha = pooling().attention(torch.randn(2, 6, 9), mask)
    torch.testing.assert_close(alpha.sum(dim=2), torch.ones(2, 6))
    assert (alpha[1, :, 4:] == 0).all()


def test_masked_statistics_are_those_of_the_real_frames() -> None:
    h = torch.randn(2, 6, 9)
    mask = length_mask(torch.tensor([9, 4]), 9)
    mean, std = plain_statistics(h, mask)
    torch.testing.assert_close(mean[1], h[1, :, :4].mean(dim=1))
    torch.testing.assert_close(std[1], h[1, :, :4].std(dim=1, correction=0))
    torch.testing.assert_close(masked_mean(h, mask)[0], h[0].mean(dim=1))


def test_large_offset_does_not_cancel() -> None:
    # E[h^2] - E[h]^2 in float32 loses a deviation of 1 beside a mean of 10,000.
    h = 10_000 + torch.randn(1, 3, 200, generator=torch.Generator().manual_seed(0))
    _, std = weighted_statistics(h, torch.full((1, 1, 200), 1 / 200))
    torch.testing.assert_close(
        std[0], h[0].double().std(dim=1, correction=0).float(), rtol=1e-3, atol=0
    )


def test_masked_batch_norm_counts_real_frames_only() -> None:
    layer = MaskedBatchNorm1d(5, momentum=1.0)
    x = torch.randn(3, 5, 8)
    lengths = [8, 2, 5]
    real = torch.cat([x[row, :, :length].T for row, length in enumerate(lengths)])
    output = layer(x, length_mask(torch.tensor(lengths), 8))
    torch.testing.assert_close(layer.running_mean, real.mean(dim=0))
    torch.testing.assert_close(layer.running_var, real.var(dim=0))
    assert (output[1, :, 2:] == 0).all()
    plain = torch.nn.BatchNorm1d(5)
    torch.testing.assert_close(output[0].T, plain(real)[:8])


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1"):
        PoolingSettings(channels=0)
    with pytest.raises(ValueError, match="variant"):
        PoolingSettings(channels=4, variant="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lengths"):
        length_mask(torch.tensor([[1, 2]]), 3)

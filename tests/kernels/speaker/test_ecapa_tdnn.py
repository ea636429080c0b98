"""ECAPA-TDNN: parameter counts of the paper, masks, gradients, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings, EcapaTdnn

SMALL = EcapaSettings(
    input_dim=10,
    channels=16,
    mfa_channels=24,
    attention_channels=8,
    se_channels=8,
    embedding_dim=12,
    scale=4,
)


def small(seed: int = 0, **changes: object) -> EcapaTdnn:
    """A small network whose BatchNorms have seen some data, in eval mode."""
    torch.manual_seed(seed)
    network = EcapaTdnn(EcapaSettings(**{**asdict(SMALL), **changes}))  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, network.settings.input_dim, 30) + 0.5)
    return network.eval()


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        # Specification, section 4: counted layer by layer (weights, biases, BatchNorm affine);
        # the paper says 6.2 M and 14.7 M for the two networks on 80 features.
        ({}, 6_088_704),
        ({"input_dim": 80}, 6_191_104),
        ({"input_dim": 80, "channels": 1024}, 14_657_472),
        ({"input_dim": 80, "attention_channels": 256, "asp_variant": "tao"}, 6_978_176),
        (
            {"input_dim": 80, "channels": 1024, "attention_channels": 256, "asp_variant": "tao"},
            15_444_544,
        ),
    ],
)
def test_parameter_counts(changes: dict, parameters: int) -> None:
    with torch.device("meta"):
        network = EcapaTdnn(EcapaSettings(**changes))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_shapes() -> None:
    network = small()
    features = torch.randn(5, 10, 37)
    embedding, blocks = network.blocks(features, torch.tensor([37, 3, 20, 1, 36]))
    assert embedding.shape == (5, 12) and embedding.dtype == torch.float32
    assert [tuple(block.shape) for block in blocks] == [(5, 16, 37)] * 3
    assert network(features).shape == (5, 12)
    assert all((block[1, :, 3:] == 0).all() for block in blocks)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(0, 9),
    st.sampled_from(["ecapa", "tao"]),
)
def test_padded_equals_unpadded(lengths: list[int], surplus: int, variant: str) -> None:
    network = small(asp_variant=variant)
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths) + surplus
    # What lies in the padding must not matter, however large it is.
    batch = 100 * torch.randn(len(lengths), 10, longest, generator=generator)
    with torch.no_grad():
        together, blocks = network.blocks(batch, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            alone, own_blocks = network.blocks(batch[row : row + 1, :, :length])
            scale = alone.abs().max().clamp(min=1)
            assert ((together[row] - alone[0]).abs().max() / scale) < 1e-5
            for block, own in zip(blocks, own_blocks, strict=True):
                size = own.abs().max().clamp(min=1)
                assert ((block[row, :, :length] - own[0]).abs().max() / size) < 1e-5


@pytest.mark.parametrize("variant", ["ecapa", "tao"])
def test_training_statistics_ignore_padding(variant: str) -> None:
    # Training on a padded batch must move BatchNorm and gradients as the same frames unpadded do.
    features = torch.randn(6, 10, 20)
    results = []
    for padding in (0, 15):
        network = small(asp_variant=variant).train()
        padded = torch.cat([features, 50 + torch.randn(6, 10, padding)], dim=2)
        network(padded, torch.full((6,), 20)).square().mean().backward()
        results.append(network)
    unpadded, padded_one = results
    for (name, a), (_, b) in zip(
        unpadded.state_dict().items(), padded_one.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    for a, b in zip(unpadded.parameters(), padded_one.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_full_lengths_equal_no_lengths_in_training() -> None:
    features = torch.randn(4, 10, 25)
    with_lengths = small().train()(features, torch.full((4,), 25))
    torch.testing.assert_close(with_lengths, small().train()(features), atol=1e-5, rtol=1e-4)


def test_shifting_inner_frames_changes_little() -> None:
    network = small()
    tone = torch.randn(1, 10, 400, generator=torch.Generator().manual_seed(1))
    quiet = torch.zeros(1, 10, 40)
    early = torch.cat([quiet[:, :, :20], tone, quiet[:, :, :20]], dim=2)
    late = torch.cat([quiet[:, :, :25], tone, quiet[:, :, :15]], dim=2)
    other = torch.randn(1, 10, 440, generator=torch.Generator().manual_seed(2)) + 0.5
    with torch.no_grad():
        a, b, c = network(early), network(late), network(other)
    assert (a - b).norm() < 0.02 * (a - c).norm()


def test_gradient_reaches_every_parameter() -> None:
    for variant in ("ecapa", "tao"):
        network = small(asp_variant=variant).train()
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(8, 12, generator=generator)
        features = torch.randn(8, 10, 30, generator=generator)
        (network(features, torch.arange(23, 31)) - target).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            assert torch.isfinite(parameter.grad).all(), name


def test_training_tells_two_speakers_apart() -> None:
    # Two "speakers" that differ in the spread of one feature only: found by the deviations.
    torch.manual_seed(0)
    network = EcapaTdnn(SMALL)
    classifier = nn.Linear(12, 2)
    labels = torch.arange(16) % 2
    optimizer = torch.optim.Adam([*network.parameters(), *classifier.parameters()], lr=5e-3)
    for _ in range(25):
        features = torch.randn(16, 10, 40)
        features[labels == 1, 3] *= 3
        loss = nn.functional.cross_entropy(classifier(network(features)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    fresh = torch.randn(16, 10, 40)
    fresh[labels == 1, 3] *= 3
    assert (classifier(network(fresh)).argmax(dim=1) == labels).float().mean() >= 0.9


def test_low_precision_network_takes_float32_features() -> None:
    network = small()
    features = torch.randn(3, 10, 30)
    exact = network(features)
    rough = small().bfloat16()(features, torch.tensor([30, 30, 30]))
    assert rough.dtype == torch.bfloat16 and torch.isfinite(rough).all()
    cosine = nn.functional.cosine_similarity(exact, rough.float())
    assert cosine.min() > 0.98


def test_dropout_acts_in_training_only() -> None:
    network = small(dropout=0.5)
    features = torch.randn(64, 10, 20)
    torch.testing.assert_close(network(features), network(features))
    zeros = (network.train()(features) == 0).float().mean()
    assert zeros == pytest.approx(0.5, abs=0.08)


def test_settings_survive_json() -> None:
    again = EcapaSettings(**json.loads(json.dumps(asdict(SMALL))))
    assert again == SMALL and isinstance(again.dilations, tuple)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 20}, "20 channels do not split into 8 equal groups"),
        ({"scale": 1}, "scale must be at least 2"),
        ({"dilations": ()}, "dilations"),
        ({"dilations": (0, 1)}, "dilations"),
        ({"dropout": 1.0}, "dropout"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"input_dim": -1}, "input_dim must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EcapaSettings(**changes)


def test_unknown_pooling_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="'ecapa' or 'tao', not 'mean'"):
        EcapaTdnn(EcapaSettings(asp_variant="mean"))  # type: ignore[arg-type]


def test_wrong_inputs_are_refused() -> None:
    network = small()
    with pytest.raises(ValueError, match=r"\(batch, 10, frames\), not \(2, 30, 10\)"):
        network(torch.randn(2, 30, 10))
    with pytest.raises(ValueError, match="from 1 to the 20 frames"):
        network(torch.randn(2, 10, 20), torch.tensor([20, 21]))
    with pytest.raises(ValueError, match="from 1 to the 20 frames"):
        network(torch.randn(2, 10, 20), torch.tensor([0, 5]))

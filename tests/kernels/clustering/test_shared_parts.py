"""The family's door, normalisation, neighbours, and the network with its statistics."""

from __future__ import annotations

import math

import pytest
import torch

from goldcrest.kernels import clustering
from goldcrest.kernels.clustering import neighbours, network
from goldcrest.kernels.clustering.normalisation import apply_norm, fit_norm


def test_methods_are_the_files_with_a_fit() -> None:
    assert {"ahc", "cimc", "kmeans"} <= set(clustering.methods())
    assert "network" not in clustering.methods()


@pytest.mark.parametrize("name", ["network", "kmean", "../ahc", ""])
def test_an_unknown_method_names_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="there are ahc, cimc"):
        clustering.load(name)


@pytest.mark.parametrize("norm", ["l2", "standard"])
def test_normalisation(norm) -> None:
    torch.manual_seed(0)
    x = 3 + torch.randn(50, 4) * torch.tensor([1.0, 2.0, 5.0, 0.0])
    found = apply_norm(fit_norm(x, norm), x)
    if norm == "l2":
        torch.testing.assert_close(found.norm(dim=1), torch.ones(50))
    else:
        torch.testing.assert_close(found.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.std(dim=0, correction=0)[:3], torch.ones(3))


@pytest.mark.parametrize("chunk", [7, 2048])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_neighbour_distances_equal_the_sorted_matrix(k: int, chunk: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64)
    x[3] = x[4]  # a duplicate is a neighbour at distance 0
    torch.testing.assert_close(
        neighbours.neighbour_distance(x, k, chunk=chunk),
        neighbours.neighbour_distance_reference(x, k),
        atol=1e-6,
        rtol=1e-6,
    )


def test_a_single_row_has_no_neighbour() -> None:
    assert neighbours.neighbour_distance(torch.ones(1, 3), 10).tolist() == [0.0]


def test_typical_distance_is_the_median() -> None:
    torch.manual_seed(0)
    x = torch.randn(101, 5)
    expected = neighbours.neighbour_distance(x, 10).median().item()
    assert neighbours.typical_neighbour_distance(x, 10) == pytest.approx(expected)


def _trained_mlp() -> network.Mlp:
    torch.manual_seed(0)
    model = network.Mlp(6, (12, 10), 4)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def test_the_start_is_almost_uniform() -> None:
    torch.manual_seed(0)
    model = network.Mlp(20, (64, 64), 10)
    p = model(torch.randn(128, 20)).softmax(dim=1)
    assert (p * 10 - 1).abs().max().item() < 0.01
    spread = model.hidden[1].linear.weight.std().item()
    assert spread == pytest.approx(0.1 / math.sqrt(64), rel=0.1)


def test_batch_norm_equals_torch_and_can_leave_its_statistics() -> None:
    ours, theirs = network.BatchNorm(5), torch.nn.BatchNorm1d(5)
    x = 2 + 3 * torch.randn(16, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    before = ours.running_var.clone()
    ours(5 * x, update_statistics=False)
    assert torch.equal(ours.running_var, before)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("chunk", [7, 64])
def test_population_statistics_make_eval_mode_equal_one_batch_of_everything(chunk: int) -> None:
    model, x = _trained_mlp(), torch.randn(64, 6)
    everything = model.train()(x, update_statistics=False)
    network.set_population_statistics(model, x, chunk=chunk)
    assert model.training
    torch.testing.assert_close(
        network.predict_logits(model, x, chunk=chunk), everything, atol=1e-5, rtol=1e-5
    )

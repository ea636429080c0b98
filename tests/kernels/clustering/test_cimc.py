"""CIMC: settings, objective, blobs, the study's claims on balanced mixtures, exact continuation."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from goldcrest.kernels.clustering import cimc, kmeans
from goldcrest.kernels.clustering.result import traced_rows
from goldcrest.kernels.metrics.clustering import accuracy, normalised_mutual_information

ALL_TERMS = dict.fromkeys(cimc.TERMS, 1.0)


def sphere_blobs(clusters: int = 8, each: int = 40, noise: float = 0.2, seed: int = 0):
    """Balanced blobs on the unit sphere, (N, 16), and their true cluster (N,)."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(clusters), each)
    centres = rng.normal(size=(clusters, 16))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    x = centres[truth] + noise * rng.normal(size=(len(truth), 16))
    return torch.from_numpy(x.astype(np.float32)), truth


def small(**values) -> cimc.Settings:
    return cimc.Settings(**{"hidden": (64, 64)} | values)


@pytest.mark.parametrize("field", ["terms", "start"])
def test_an_unknown_term_names_those_allowed(field: str) -> None:
    values = {"terms": {"imsat": 1.0}, field: {"imsat": 1, "mixupp": 1}}
    with pytest.raises(ValueError, match=r"unknown term 'mixupp'.*imsat, mixup, supcon, aug"):
        cimc.Settings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"terms": {}}, "at least one term"),
        ({"terms": {"imsat": 1.0}, "start": {"imsat": 2}}, "no wait at the start"),
        ({"terms": {"supcon": 1.0}, "start_certainty": 0.5}, "no wait at the start"),
        ({"start_certainty": 1.0}, "start_certainty"),
        ({"terms": {"imsat": 1.0, "mixup": -1.0}}, "weights of terms"),
        ({"hidden": ()}, "hidden"),
        ({"vat_xi": 0.0}, "vat_xi"),
        ({"vat_iterations": 0}, "vat_iterations"),
        ({"mixup_beta": float("nan")}, "mixup_beta"),
        ({"mu": -1.0}, "mu"),
        ({"norm": "l3"}, "norm"),
        ({"mixup_space": "cosine"}, "mixup_space"),
        ({"vat_radius_mode": "random"}, "vat_radius_mode"),
    ],
)
def test_bad_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cimc.Settings(**values)


def test_terms_start_at_their_epochs() -> None:
    settings = small(start={"mixup": 3, "supcon": 5})
    assert settings.active(0) == {"imsat"}
    assert settings.active(3) == {"imsat", "mixup"}
    assert settings.active(5) == {"imsat", "mixup", "supcon"}


def test_other_terms_wait_for_certainty() -> None:
    # Untrained predictions carry no information: MI/H(Y) = 0, so mixup and supcon are off.
    objective = _objective(small(start_certainty=0.5))
    model = objective.build_model()
    batch = objective.batch(np.arange(64), np.random.default_rng(0))
    waiting = objective.losses(model, batch, epoch=0)
    assert list(waiting) == ["sat", "information", "mixup", "supcon"]
    assert (waiting["mixup"].item(), waiting["supcon"].item()) == (0, 0)
    model.output.weight.data.normal_(std=20)  # now it is certain of every sample
    certain = objective.losses(model, batch, epoch=0)
    assert certain["mixup"].item() > 0
    assert certain["supcon"].item() > 0


def test_presets_are_the_papers_systems() -> None:
    # Equations 10.1, 10.9 and 10.10; IMSAT's own repository for the last line.
    assert set(cimc.PRESETS["cimc"].terms) == {"imsat", "mixup", "supcon"}
    assert set(cimc.PRESETS["cimc+"].terms) == {"imsat", "mixup", "supcon", "aug"}
    assert set(cimc.PRESETS["cimc++"].terms) == {"imsat", "mixup", "supcon", "aug", "infonce"}
    assert cimc.PRESETS["cimc"].hidden == (20_800, 20_800)
    assert (cimc.PRESETS["cimc"].information_weight, cimc.PRESETS["cimc"].mu) == (0.5, 3.5)
    reference = cimc.PRESETS["imsat_reference"]
    assert (reference.information_weight, reference.mu, reference.vat_xi) == (0.1, 4.0, 10.0)


def _objective(settings: cimc.Settings, **more) -> cimc.CimcObjective:
    x, _ = sphere_blobs()
    x = torch.nn.functional.normalize(x)
    radius = cimc.radii(x, settings, seed=0)
    augmented = torch.stack([x + 0.05 * torch.randn_like(x) for _ in range(3)])
    return cimc.CimcObjective(x, radius, 8, settings, augmented=augmented, **more)


@pytest.mark.parametrize("name", cimc.TERMS)
def test_every_term_alone_gives_finite_losses_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    objective = _objective(small(terms={name: 1.0}))
    model = objective.build_model()
    batch = objective.batch(np.arange(64), np.random.default_rng(0))
    losses = objective.losses(model, batch, epoch=0)
    torch.stack(list(losses.values())).sum().backward()
    assert losses
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_weights_scale_every_term() -> None:
    found = []
    for weight in (1.0, 2.5):
        torch.manual_seed(0)
        objective = _objective(small(terms=dict.fromkeys(cimc.TERMS, weight)))
        model = objective.build_model()
        model.output.weight.data.normal_(std=0.1)  # away from the uniform start: no term is 0
        batch = objective.batch(np.arange(64), np.random.default_rng(0))
        found.append(objective.losses(model, batch, epoch=0))
    for name, value in found[0].items():
        assert value.item() != 0
        torch.testing.assert_close(found[1][name], 2.5 * value)


def test_only_the_clean_pass_updates_running_statistics() -> None:
    objective = _objective(small(terms=ALL_TERMS))
    model = objective.build_model()
    plain = objective.build_model()
    plain.load_state_dict(model.state_dict())
    batch = objective.batch(np.arange(64), np.random.default_rng(0))
    objective.losses(model, batch, epoch=0)
    plain(batch["x"])
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_depends_on_its_generator_alone() -> None:
    objective = _objective(small(terms=ALL_TERMS))
    first, again = (objective.batch(np.arange(9), np.random.default_rng(4)) for _ in range(2))
    assert set(first) == {"x", "radius", "direction", "partner", "share", "augmented"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(
        objective.batch(np.array([7, 2]), np.random.default_rng(0))["radius"],
        objective.radius[[7, 2]],
    )  # indexed by the shuffled order


def test_the_objective_travels_to_workers() -> None:
    copy = pickle.loads(pickle.dumps(_objective(small())))
    assert len(copy) == 320


def test_radii_are_a_share_of_the_tenth_neighbours_distance() -> None:
    x = torch.nn.functional.normalize(sphere_blobs()[0])
    tenth = torch.cdist(x, x).sort(dim=1).values[:, 10]
    torch.testing.assert_close(cimc.radii(x, small(), seed=0), 0.25 * tenth, atol=1e-5, rtol=1e-4)
    constant = cimc.radii(x, small(vat_radius_mode="constant"), seed=0)
    torch.testing.assert_close(constant, (0.25 * tenth).median().expand(320), atol=1e-5, rtol=1e-4)


def test_cimc_with_the_studys_settings_finds_blobs_and_beats_its_start(loop) -> None:
    x, truth = sphere_blobs(each=100, noise=0.15)
    train = loop(epochs=30, batch_size=200, learning_rate=0.5)
    found = cimc.fit(x, 8, small(start_certainty=0.8), seed=0, train=train)
    assert accuracy(found.labels, truth) > 0.95
    assert found.trace is not None
    assert accuracy(found.trace[-1], truth) > accuracy(found.trace[0], truth) + 0.2
    assert found.history[-1]["mutual_information"] > 0.9 * np.log(8)
    assert np.array_equal(cimc.predict(found.model, x), found.labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_cimc_with_the_studys_settings_beats_kmeans_on_balanced_mixtures(loop, seed: int) -> None:
    # lambda = 0.5, mu = 3.5, all weights 1, SGD with momentum 0.9 and decay 0.996 per epoch.
    x, truth = sphere_blobs(clusters=10, each=100, noise=0.15, seed=seed)
    train = loop(epochs=60, batch_size=200, learning_rate=0.2, seed=seed)
    found = cimc.fit(x, 10, small(start_certainty=0.9), seed=seed, train=train)
    plain = kmeans.fit(x, 10, kmeans.Settings(), seed=seed)
    ours = normalised_mutual_information(found.labels, truth)
    assert ours > normalised_mutual_information(plain.labels, truth) + 0.03
    assert accuracy(found.labels, truth) > accuracy(plain.labels, truth) + 0.1


def test_standalone_supcon_does_not_find_blobs(loop) -> None:
    # The study's table 10.2: SupCon alone stays at about 1 % accuracy.
    x, truth = sphere_blobs()
    train = loop(epochs=30, batch_size=160, learning_rate=0.5)
    found = cimc.fit(x, 8, small(terms={"supcon": 1.0}), seed=0, train=train)
    assert accuracy(found.labels, truth) < 0.6


def test_labels_of_every_epoch_are_kept_also_over_a_resumption(loop) -> None:
    x, _ = sphere_blobs(each=20)
    train = loop(epochs=3, batch_size=80, learning_rate=0.05)
    whole = cimc.fit(x, 8, small(), seed=0, train=train)
    assert whole.trace is not None
    assert whole.trace.shape == (3, len(x))
    assert np.array_equal(whole.trace[-1], whole.labels)

    def cut(objective: cimc.CimcObjective):
        fresh = pickle.loads(pickle.dumps(objective))
        return train(fresh, resume=train(objective, stop_after=1))

    assert np.array_equal(cimc.fit(x, 8, small(), seed=0, train=cut).trace, whole.trace)


def test_few_rows_of_many_are_traced() -> None:
    assert traced_rows(7).tolist() == list(range(7))
    rows = traced_rows(1_000_003)
    assert (len(rows), rows[0], rows[-1]) == (20_000, 0, 1_000_002)


def test_the_start_carries_no_information(loop) -> None:
    # The tiny output layer: H(Y) = H(Y|X) = log C at step 0.
    objective = _objective(small())
    torch.manual_seed(0)
    row = objective.evaluate(objective.build_model().eval(), epoch=0)
    assert row["mutual_information"] == pytest.approx(0, abs=1e-4)
    assert row["marginal_entropy"] == pytest.approx(np.log(8), abs=1e-4)


def test_lonely_steps_of_supcon_are_counted() -> None:
    objective = _objective(small(terms={"supcon": 1.0}))
    model = objective.build_model()
    batch = objective.batch(np.arange(1), np.random.default_rng(0))
    objective.losses(model.eval(), batch, epoch=0)
    assert objective.evaluate(model, epoch=0)["supcon_lonely_steps"] == 1


def test_a_resumed_run_equals_an_undisturbed_one(loop) -> None:
    train = loop(epochs=6, batch_size=80, learning_rate=0.05)
    settings = small(
        terms=dict(cimc.PRESETS["cimc++"].terms), start={"mixup": 2, "supcon": 4, "infonce": 4}
    )
    torch.manual_seed(0)
    whole = train(_objective(settings))
    torch.manual_seed(0)
    first = train(_objective(settings), stop_after=3)
    torch.manual_seed(0)
    resumed = train(_objective(settings), resume=first)
    assert all(np.isfinite(list(row.values())).all() for row in whole.history)
    assert resumed.history == whole.history
    for name, value in whole.model_state.items():
        assert torch.equal(resumed.model_state[name], value)


def test_missing_copies_and_wrong_shapes_are_refused(loop) -> None:
    x, _ = sphere_blobs(each=4)
    train = loop(epochs=1, batch_size=16, learning_rate=0.1)
    with pytest.raises(ValueError, match="need vectors of augmented copies"):
        cimc.fit(x, 8, small(terms=ALL_TERMS), seed=0, train=train)
    with pytest.raises(ValueError, match=r"must be \(J, N, D\)"):
        cimc.fit(x, 8, small(), seed=0, train=train, augmented=x)
    with pytest.raises(ValueError, match="pass `train`"):
        cimc.fit(x, 8, small(), seed=0)


def test_augmented_terms_train_end_to_end(loop) -> None:
    x, truth = sphere_blobs()
    torch.manual_seed(0)
    augmented = x + 0.05 * torch.randn(2, *x.shape)
    settings = small(terms=dict(cimc.PRESETS["cimc++"].terms), start_certainty=0.9)
    train = loop(epochs=60, batch_size=80, learning_rate=0.2)
    found = cimc.fit(x, 8, settings, seed=0, train=train, augmented=augmented)
    assert normalised_mutual_information(found.labels, truth) > 0.9

"""CIMC: clustering by information maximisation, virtual adversarial training, mixup and contrast.

Source: Fathan & Alam 2025, "An Efficient Clustering Algorithm for Self-Supervised Speaker
Recognition", equations 10.1-10.10; built on IMSAT (Hu et al. 2017). A network p(cluster | vector)
is trained without labels by a weighted sum of terms, each in its own file under `terms/`:

    IMSAT  = R_SAT + lambda (H(Y|X) - mu H(Y))      imsat
    CIMC   = IMSAT + Mixup + SupCon                 imsat, mixup, supcon
    CIMC+  = CIMC + L_aug                           imsat, mixup, supcon, aug
    CIMC++ = CIMC + L_aug + L_InfoNCE               imsat, mixup, supcon, aug, infonce

The method is an objective for a training engine, which owns batches, optimiser and checkpoints; it
has no loop of its own. The study: SGD, momentum 0.9, learning rate 0.01 decaying by 0.996 *per
epoch*, batches of 10,240, 150 epochs, the last partial batch dropped. The batch is part of the
objective: its H(Y) is at most log(batch), so it should be several times C. Workers see the H(Y) of
their common batch; micro-batches of gradient accumulation do not (`terms.imsat.two_pass_backward`
is the exact way).

Why the other terms may wait (`start_certainty`): the network starts from logits near 0, and the
gradient of *normalised* logits grows as 1/|logits|, so that SupCon and InfoNCE swamp everything in
the first steps and pull all vectors into one cluster. They, and mixup, are harmless once the
predictions say something, which MI/H(Y) of the predictions tells without labels.

N utterances, B batch, D dimensions, C clusters, S hidden units, J augmentations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from goldcrest.kernels.clustering.neighbours import neighbour_distance, typical_neighbour_distance
from goldcrest.kernels.clustering.network import Mlp, predict_logits, set_population_statistics
from goldcrest.kernels.clustering.normalisation import Norm, apply_norm, check_norm, fit_norm
from goldcrest.kernels.clustering.parallel import mean_over_workers
from goldcrest.kernels.clustering.result import Clustering, Train, check_input, traced_rows
from goldcrest.kernels.clustering.terms import vicreg
from goldcrest.kernels.clustering.terms.augmentation import FixedSide, augmentation_loss
from goldcrest.kernels.clustering.terms.divergence import cross_entropy, kl_divergence
from goldcrest.kernels.clustering.terms.imsat import entropies, entropy, information_loss
from goldcrest.kernels.clustering.terms.infonce import Distance, infonce_loss
from goldcrest.kernels.clustering.terms.mixup import MixSpace, mixup_loss
from goldcrest.kernels.clustering.terms.supcon import AnchorMean, supcon_loss
from goldcrest.kernels.clustering.terms.vat import adversarial_perturbation

TRAINED = True

TERMS = ("imsat", "mixup", "supcon", "aug", "infonce", "vicreg_inv", "vicreg_var", "vicreg_cov")
"""Names of the terms. `aug` and `infonce` need augmented copies of the vectors."""


SatDivergence = Literal["kl", "ce"]
RadiusMode = Literal["knn", "constant"]

_CHOICES = {
    "sat_divergence": get_args(SatDivergence),
    "vat_radius_mode": get_args(RadiusMode),
    "mixup_space": get_args(MixSpace),
    "supcon_anchor_mean": get_args(AnchorMean),
    "aug_fixed": get_args(FixedSide),
    "infonce_distance": get_args(Distance),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The maths of CIMC; how it is trained belongs to the engine."""

    norm: Norm = "l2"  # normalisation of the vectors: l2 (rows), standard (columns), none
    hidden: tuple[int, ...] = (20_800, 20_800)  # S, units of the hidden layers
    terms: Mapping[str, float] = field(  # weight of each term (eq. 10.1: all 1); others are off
        default_factory=lambda: {"imsat": 1.0, "mixup": 1.0, "supcon": 1.0}
    )
    start: Mapping[str, int] = field(default_factory=dict)  # first epoch of a term, 0 if not named
    start_certainty: float = 0.0  # terms other than imsat wait until MI/H(Y) has reached this share
    information_weight: float = 0.5  # lambda of eq. 10.2, on both entropies
    mu: float = 3.5  # mu of eq. 10.2, on H(Y): 1 is mutual information, above it equal sizes
    sat_divergence: SatDivergence = "kl"  # R_SAT as KL or cross-entropy (equal gradients)
    vat_xi: float = 0.1  # xi, length of the probe; 10 in IMSAT, for rows of norm 28
    vat_iterations: int = 1  # power iterations (I_p)
    vat_radius: float = 0.25  # eps as a share of the distance to a near neighbour
    vat_neighbour: int = 10  # which neighbour that is
    vat_radius_mode: RadiusMode = "knn"  # per vector, or the median of a sample
    mixup_beta: float = 1.0  # a of Beta(a, a); 1 is uniform
    mixup_space: MixSpace = "logits"  # what is mixed: logits, or probabilities (the ablation)
    mixup_fixed_target: bool = True  # no gradient through the mixed target (VMT)
    mixup_renormalise: bool = False  # mixed inputs back to unit length (not in eq. 10.5)
    supcon_temperature: float = 1.0  # tau
    supcon_base_temperature: float = 1.0  # base temperature, the loss is scaled by tau/base
    supcon_anchor_mean: AnchorMean = "positive"  # mean over anchors with a positive, or over all
    aug_fixed: FixedSide = "none"  # side of eq. 10.7 without gradient
    infonce_temperature: float = 1.0  # tau of eq. 10.8
    infonce_distance: Distance = "cosine"  # sim of eq. 10.8: cosine, or -KL (tried, was worse)
    vicreg_gamma: float = 1.0  # target standard deviation of v

    def __post_init__(self) -> None:
        """Refuse unknown terms and values outside their range."""
        check_norm(self.norm)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, listed in (("terms", self.terms), ("start", self.start)):
            unknown = sorted(set(listed) - set(TERMS))
            if unknown:
                allowed = ", ".join(TERMS)
                raise ValueError(f"cimc: unknown term '{unknown[0]}' in {name}; allowed: {allowed}")
        if not self.active(0, 0.0):
            raise ValueError(
                "cimc: at least one term must have a positive weight and no wait at the start"
            )
        if any(weight < 0 for weight in self.terms.values()):
            raise ValueError(f"cimc: weights of terms must be at least 0, got {dict(self.terms)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"cimc: hidden must list layer sizes of at least 1, got {self.hidden}")
        for name in ("vat_iterations", "vat_neighbour"):
            if getattr(self, name) < 1:
                raise ValueError(f"cimc: {name} must be at least 1, got {getattr(self, name)}")
        positive = ("vat_xi", "mixup_beta", "supcon_temperature", "supcon_base_temperature")
        for name in (*positive, "infonce_temperature", "information_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"cimc: {name} must be above 0, got {getattr(self, name)}")
        for name in ("mu", "vat_radius", "vicreg_gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"cimc: {name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.start_certainty < 1:
            raise ValueError(f"cimc: start_certainty must be in [0, 1), got {self.start_certainty}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                raise ValueError(f"cimc: unknown {name} '{getattr(self, name)}'; there are {known}")

    def active(self, epoch: int, certainty: float = 1.0) -> frozenset[str]:
        """Terms with a positive weight whose first epoch and certainty (MI/H(Y)) have come."""
        return frozenset(
            name
            for name, weight in self.terms.items()
            if weight > 0
            and epoch >= self.start.get(name, 0)
            and (name == "imsat" or certainty >= self.start_certainty)
        )

    @property
    def needs_augmented(self) -> bool:
        """Whether a term compares vectors with their augmented copies."""
        return any(self.terms.get(name, 0) > 0 for name in ("aug", "infonce"))


PRESETS: Mapping[str, Settings] = {
    "imsat": Settings(terms={"imsat": 1.0}),
    "imsat_reference": Settings(
        terms={"imsat": 1.0}, hidden=(1200, 1200), information_weight=0.1, mu=4.0, vat_xi=10.0
    ),
    "cimc": Settings(),
    "cimc+": Settings(terms={"imsat": 1.0, "mixup": 1.0, "supcon": 1.0, "aug": 1.0}),
    "cimc++": Settings(
        terms={"imsat": 1.0, "mixup": 1.0, "supcon": 1.0, "aug": 1.0, "infonce": 1.0}
    ),
}
"""The study's systems (equations 10.1, 10.2, 10.9, 10.10), and IMSAT as first published."""


class CimcObjective:
    """What a training engine needs to train the clustering network.

    Holds the normalised vectors x (N, D), their radii eps (N,) and augmented copies (J, N, D).
    """

    def __init__(
        self,
        x: Tensor,
        radius: Tensor,
        clusters: int,
        settings: Settings,
        *,
        augmented: Tensor | None = None,
    ) -> None:
        self.x, self.radius, self.augmented = x, radius, augmented
        self.clusters, self.settings = clusters, settings
        self._labels = torch.full((len(x),), -1)
        self._traced = torch.from_numpy(traced_rows(len(x)))
        self._trace = torch.empty((0, len(self._traced)), dtype=torch.int32)
        self._lonely = torch.zeros((), dtype=torch.int64)
        self._certainty = torch.zeros(())
        terms = [name for name in TERMS if settings.terms.get(name, 0) > 0]
        parts = {name: ("sat", "information") if name == "imsat" else (name,) for name in terms}
        self._weights = {  # of every named loss; the names are the same in every step
            part: settings.terms[name] for name in terms for part in parts[name]
        }

    def __len__(self) -> int:
        """Vectors per epoch."""
        return len(self.x)

    def build_model(self) -> nn.Module:
        """The untrained network D - S - S - C."""
        return Mlp(self.x.shape[1], self.settings.hidden, self.clusters)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One group; nothing is treated apart."""
        return [{"params": list(model.parameters())}]

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Vectors at `indices` (B,) with the randomness of all terms: VAT's start, mixup's partners
        and shares, one augmented copy each."""
        rows = torch.as_tensor(indices)
        size, a = len(indices), self.settings.mixup_beta
        batch = {
            "x": self.x[rows],
            "radius": self.radius[rows],
            "direction": torch.from_numpy(rng.standard_normal((size, self.x.shape[1]), np.float32)),
            "partner": torch.from_numpy(rng.permutation(size)),
            "share": torch.from_numpy(rng.beta(a, a, size).astype(np.float32)),
        }
        if self.augmented is not None:
            copy = torch.from_numpy(rng.integers(len(self.augmented), size=size))
            batch["augmented"] = self.augmented[copy, rows]
        return batch

    def losses(
        self, model: nn.Module, batch: dict[str, Tensor], *, epoch: int
    ) -> dict[str, Tensor]:
        """The weighted terms, 0 where not yet active. `imsat` is two: `sat` and `information`.

        Only the clean pass updates the running statistics of the batch norms.
        """
        settings, x, logits = self.settings, batch["x"], model(batch["x"])
        active = settings.active(epoch, self._certainty_with(logits))
        quiet = partial(model, update_statistics=False)
        found: dict[str, Tensor] = {}
        if active & {"imsat", "vicreg_inv"}:
            push = adversarial_perturbation(
                quiet,
                x,
                logits,
                batch["direction"],
                batch["radius"],
                xi=settings.vat_xi,
                iterations=settings.vat_iterations,
            )
            perturbed = quiet(x + push)
        if "imsat" in active:
            divergence = kl_divergence if settings.sat_divergence == "kl" else cross_entropy
            found["sat"] = divergence(logits.detach(), perturbed)
            found["information"] = information_loss(
                logits, weight=settings.information_weight, mu=settings.mu
            )
        if "vicreg_inv" in active:
            found["vicreg_inv"] = vicreg.INVARIANCE * vicreg.invariance(logits, perturbed)
        if active & {"aug", "infonce"}:
            found |= self._augmented_losses(quiet(batch["augmented"]), logits, active)
        found |= self._clean_losses(quiet, batch, logits, active)
        off = logits.new_zeros(())
        return {name: weight * found.get(name, off) for name, weight in self._weights.items()}

    def _clean_losses(
        self, quiet: partial[Tensor], batch: dict[str, Tensor], logits: Tensor, active: frozenset
    ) -> dict[str, Tensor]:
        settings, found = self.settings, {}
        if "mixup" in active:
            found["mixup"] = mixup_loss(
                quiet,
                batch["x"],
                logits,
                batch["partner"],
                batch["share"],
                space=settings.mixup_space,
                fixed_target=settings.mixup_fixed_target,
                renormalise=settings.mixup_renormalise,
            )
        if "supcon" in active:
            found["supcon"] = supcon_loss(
                logits,
                temperature=settings.supcon_temperature,
                base_temperature=settings.supcon_base_temperature,
                anchor_mean=settings.supcon_anchor_mean,
            )
            self._lonely += int(found["supcon"] == 0)
        if "vicreg_var" in active:
            value = vicreg.variance(logits, gamma=settings.vicreg_gamma)
            found["vicreg_var"] = vicreg.VARIANCE * value
        if "vicreg_cov" in active:
            found["vicreg_cov"] = vicreg.COVARIANCE * vicreg.covariance(logits)
        return found

    def _augmented_losses(
        self, augmented: Tensor, logits: Tensor, active: frozenset
    ) -> dict[str, Tensor]:
        settings, found = self.settings, {}
        if "aug" in active:
            found["aug"] = augmentation_loss(logits, augmented, fixed=settings.aug_fixed)
        if "infonce" in active:
            found["infonce"] = infonce_loss(
                logits,
                augmented,
                temperature=settings.infonce_temperature,
                distance=settings.infonce_distance,
            )
        return found

    @torch.no_grad()
    def _certainty_with(self, logits: Tensor) -> float:
        """The greatest MI/H(Y) of any batch so far; the same number on every worker."""
        marginal, conditional = entropies(logits.detach())
        certainty = 1 - mean_over_workers(conditional) / marginal.clamp_min(1e-8)
        self._certainty = torch.maximum(self._certainty, certainty.to(self._certainty))
        return float(self._certainty)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """No weight is held at zero."""
        return {}

    def after_step(self, model: nn.Module, whole: Any) -> None:
        """Nothing follows a step."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, epoch: int) -> dict[str, float]:
        """Label-free state of the clustering, after exact batch-norm statistics.

        Entropies and mutual information over all vectors (nats), clusters in use, the entropy of
        their sizes, the share of vectors that kept their cluster since the last epoch
        (`stability`), steps on which SupCon found no pair.
        """
        assert isinstance(model, Mlp)
        set_population_statistics(model, self.x)
        logits = predict_logits(model, self.x)
        p = logits.softmax(dim=1)
        marginal, conditional = float(entropy(p.mean(dim=0))), float(entropy(p).mean())
        labels = logits.argmax(dim=1)
        sizes = labels.bincount(minlength=self.clusters)
        metrics = {
            "marginal_entropy": marginal,
            "conditional_entropy": conditional,
            "mutual_information": marginal - conditional,
            "size_entropy": float(entropy(sizes / len(labels))),
            "clusters": float((sizes > 0).sum()),
            "stability": float((labels == self._labels).float().mean()),
        }
        if "supcon" in self.settings.terms:
            metrics["supcon_lonely_steps"] = float(self._lonely)
        self._labels = labels
        self._trace = torch.cat([self._trace, labels[self._traced][None].int()])
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run must know to be the same, and the trace of the labels."""
        return {
            "labels": self._labels,
            "lonely": self._lonely,
            "certainty": self._certainty,
            "trace": self._trace,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._labels, self._lonely = state["labels"].clone(), state["lonely"].clone()
        self._certainty = state["certainty"].clone()
        self._trace = state["trace"].clone()


def radii(x: Tensor, settings: Settings, *, seed: int) -> Tensor:
    """eps (N,) of each row of x (N, D): `vat_radius` times a near neighbour's distance."""
    if settings.vat_radius_mode == "knn":
        return settings.vat_radius * neighbour_distance(x, settings.vat_neighbour)
    typical = typical_neighbour_distance(x, settings.vat_neighbour, seed=seed)
    return torch.full((len(x),), settings.vat_radius * typical)


def fit(
    x: Tensor,
    clusters: int,
    settings: Settings,
    *,
    seed: int,
    train: Train | None = None,
    augmented: Tensor | None = None,
) -> Clustering:
    """Cluster x (N, D) float32 into at most `clusters` clusters; empty ones are legal.

    `train` (required) trains the objective, under the engine's own seed; `augmented` (J, N, D) are
    vectors of augmented copies of the same utterances in the same order, needed by `aug` and
    `infonce`. Raises ValueError on bad input.
    """
    check_input(x, clusters)
    if train is None:
        raise ValueError("cimc is trained by gradients: pass `train`")
    if settings.needs_augmented and augmented is None:
        raise ValueError("cimc: the terms aug and infonce need vectors of augmented copies")
    if augmented is not None and augmented.shape[1:] != x.shape:
        shapes = f"{tuple(augmented.shape)} for vectors {tuple(x.shape)}"
        raise ValueError(f"cimc: augmented copies must be (J, N, D), got {shapes}")
    norm = fit_norm(x, settings.norm)
    raw, x = x, apply_norm(norm, x)
    if augmented is not None:
        augmented = torch.stack([apply_norm(norm, copy) for copy in augmented])
    radius = radii(x, settings, seed=seed)
    trained = train(CimcObjective(x, radius, clusters, settings, augmented=augmented))
    network = _network(trained.model_state)
    set_population_statistics(network, x)
    model = dict(norm) | {f"network.{name}": value for name, value in network.state_dict().items()}
    return Clustering(
        labels=predict(model, raw),
        history=list(trained.history),
        model=model,
        trace=trained.extra_state["trace"].numpy(),
    )


def _network(state: Mapping[str, Tensor]) -> Mlp:
    """The network whose sizes and weights are those of `state`."""
    depth = sum(name.endswith(".linear.weight") for name in state)
    weights = [state[f"hidden.{layer}.linear.weight"] for layer in range(depth)]
    network = Mlp(
        weights[0].shape[1], [len(weight) for weight in weights], len(state["output.weight"])
    )
    network.load_state_dict(dict(state))
    return network.eval()


def predict(model: Mapping[str, Tensor], x: Tensor) -> np.ndarray:
    """Cluster (N,) int64 of each row of x (N, D): the arg max in eval mode."""
    state = {
        name.removeprefix("network."): value
        for name, value in model.items()
        if name.startswith("network.")
    }
    return predict_logits(_network(state), apply_norm(model, x)).argmax(dim=1).numpy()

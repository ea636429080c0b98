"""The search for a recipe: the smallest quantization that keeps the metric within a tolerance.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2 and figure 1
(try recipes in order, accept the first whose relative loss is within the target).

    loss = (baseline - metric) / baseline        turned round where lower is better (perplexity)

Recipes are ordered by what they cost to serve, then by what they cost to make, so the first that
passes is the one to keep. Where none does, the best of them is tried again with its most sensitive
layers on 8 bits, or float: the variant that adds fewest bytes first.

Nothing here runs a model: trials come from the caller, in the order of the recipes, as an iterator
that may work ahead. What is read of it, hence the result, does not depend on how far ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from goldcrest.kernels.weight_only.grid import SCALE_TYPES, GridSettings
from goldcrest.kernels.weight_only.torch_int4 import GROUP_SIZES

Prefer = Literal["size", "latency", "accuracy"]
"""What recipes are ordered by: bytes stored, bytes read per token, or the finest grid first."""

EFFORT = ("rtn", "gptq", "awq", "teq", "autoround")
"""Methods from the quickest to the slowest; methods not listed are tried after these."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized."""

    method: str
    grid: GridSettings
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method, complete
    high_precision: tuple[str, ...] = ()  # layers that stay float
    eight_bits: tuple[str, ...] = ()  # layers rounded to 8 bits

    @property
    def name(self) -> str:
        """For tables: method, group size, scheme, and how many layers are spared."""
        group = "per row" if self.grid.group_size == -1 else f"g{self.grid.group_size}"
        spared = [f"{len(self.eight_bits)} at 8 bits"] if self.eight_bits else []
        spared += [f"{len(self.high_precision)} float"] if self.high_precision else []
        return " ".join([self.method, group, self.grid.scheme, *(f"+ {each}" for each in spared)])

    def record(self) -> dict[str, Any]:
        """The recipe as plain JSON."""
        return {
            "algorithm": self.method,
            **asdict(self.grid),
            "algorithm_settings": dict(self.settings),
            "high_precision": list(self.high_precision),
            "eight_bits": list(self.eight_bits),
        }


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a recipe."""

    metric: float  # NaN or infinite: the quantized model is broken
    size: int  # bytes of the whole model


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a trial passes."""

    baseline: float  # the float model's metric
    higher_is_better: bool
    tolerance: float = 0.01  # relative loss that is accepted
    max_trials: int = 100

    def __post_init__(self) -> None:
        if not math.isfinite(self.baseline) or self.baseline == 0:
            raise ValueError(
                f"the float model's metric is {self.baseline}: no loss is relative to it"
            )
        if self.max_trials < 1:
            raise ValueError("a search needs at least one trial")

    def loss(self, metric: float) -> float:
        """Relative loss; below 0 where the metric got better, infinite for a broken model."""
        if not math.isfinite(metric):
            return math.inf
        worse = self.baseline - metric if self.higher_is_better else metric - self.baseline
        return worse / abs(self.baseline)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The end of a search."""

    tried: tuple[tuple[Recipe, Trial], ...]  # in order
    chosen: int  # place in `tried`
    passed: bool  # within the tolerance; if not, the least loss of all

    @property
    def recipe(self) -> Recipe:
        """The recipe to keep."""
        return self.tried[self.chosen][0]


Trials = Callable[[Sequence[Recipe]], Iterator[Trial]]
"""Trials of recipes, in their order; closing the iterator ends those that are under way."""


def search(
    recipes: Sequence[Recipe],
    trials: Trials,
    rule: Rule,
    spare: Callable[[Recipe], Sequence[Recipe]] = lambda best: (),
) -> Found:
    """Try recipes in order until one passes; then, if none does, `spare(best)`.

    At most `rule.max_trials` trials in all. Without one that passes, the least loss is chosen, the
    smaller model among equals. Raises ValueError without recipes.
    """
    if not recipes:
        raise ValueError("there are no recipes to try")
    tried: list[tuple[Recipe, Trial]] = []
    passed = _try_until_passed(list(recipes)[: rule.max_trials], trials, rule, tried)
    if not passed and len(tried) < rule.max_trials:
        best, trial = tried[_best(tried, rule)]
        if math.isfinite(rule.loss(trial.metric)):
            more = list(spare(best))[: rule.max_trials - len(tried)]
            passed = _try_until_passed(more, trials, rule, tried)
    chosen = len(tried) - 1 if passed else _best(tried, rule)
    return Found(tried=tuple(tried), chosen=chosen, passed=passed)


def _try_until_passed(
    recipes: Sequence[Recipe], trials: Trials, rule: Rule, tried: list[tuple[Recipe, Trial]]
) -> bool:
    """Append trials to `tried` up to the first that passes; whether one did."""
    if not recipes:
        return False
    with closing(trials(recipes)) as results:  # type: ignore[type-var]
        for recipe, trial in zip(recipes, results, strict=True):
            tried.append((recipe, trial))
            if rule.loss(trial.metric) <= rule.tolerance:
                return True
    return False


def _best(tried: Sequence[tuple[Recipe, Trial]], rule: Rule) -> int:
    """Place of the least loss, the smaller model among equals, the earlier among those."""
    keys = [(rule.loss(trial.metric), trial.size) for _, trial in tried]
    return keys.index(min(keys))


# --- which recipes, in which order --------------------------------------------------------------


def ordered(recipes: Sequence[Recipe], prefer: Prefer) -> list[Recipe]:
    """Recipes by what is preferred, then by effort; the order given decides among equals."""

    def key(recipe: Recipe) -> tuple[float, int]:
        if prefer == "size":
            cost = stored_bits(recipe.grid)
        elif prefer == "latency":
            cost = read_bits(recipe.grid)
        else:
            cost = -stored_bits(recipe.grid)
        effort = EFFORT.index(recipe.method) if recipe.method in EFFORT else len(EFFORT)
        return cost, effort

    return sorted(recipes, key=key)


def stored_bits(grid: GridSettings) -> float:
    """Bits per weight in the file: codes, and a group's scale and zero point (-1: next to none)."""
    scale = 8 * SCALE_TYPES[grid.scale_dtype].itemsize
    zero = grid.bits if grid.scheme == "asym" else 0
    return grid.bits + (0 if grid.group_size == -1 else (scale + zero) / grid.group_size)


def read_bits(grid: GridSettings) -> float:
    """Bits per weight that a token's products read: decoding waits for memory.

    Torch's operator keeps a scale and an offset of 16 bits a group, whatever the scheme, for groups
    of up to 256. Other bits and groups are decoded to float first, which costs as much as reading
    that.
    """
    largest = max(GROUP_SIZES)
    size = largest if grid.group_size == -1 else min(grid.group_size, largest)
    if grid.bits != 4 or size not in GROUP_SIZES or grid.ragged:
        return grid.bits + 32.0
    return grid.bits + 32 / size


def sparing(
    recipe: Recipe, errors: Mapping[str, float], weights: Mapping[str, int], most: int
) -> list[Recipe]:
    """The recipe with its 1, 2, 4, .., `most` most sensitive layers on 8 bits, or float.

    Args:
        recipe: what did not pass.
        errors: how much each layer suffers (see `transformer.sensitivities`).
        weights: number of weights of each layer.
        most: layers spared at most.

    The variant that adds fewest bytes comes first.
    """
    ranked = sorted(errors, key=lambda name: (-errors[name], name))[:most]
    counts = [2**step for step in range(len(ranked).bit_length()) if 2**step < len(ranked)]
    variants = []
    for count in [*counts, len(ranked)] if ranked else []:
        names = tuple(ranked[:count])
        size = sum(weights[name] for name in names)
        eight = replace(recipe, eight_bits=(*recipe.eight_bits, *names))
        kept = replace(recipe, high_precision=(*recipe.high_precision, *names))
        variants += [((8 - recipe.grid.bits) * size, eight), ((32 - recipe.grid.bits) * size, kept)]
    return [variant for _, variant in sorted(variants, key=lambda pair: pair[0])]

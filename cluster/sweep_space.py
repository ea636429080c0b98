"""The space of a sweep: which fields of a config vary, and over what.

A space is a YAML file over the dotted paths that `-o` takes, one axis each:

    clustering.settings.mu:           {uniform: [1.0, 5.0]}       # any number between the two
    pretrain.training.learning_rate:  {loguniform: [1e-4, 1e-2]}  # the same, over the logarithm
    corpus.embedded.speakers:         {randint: [20, 60]}         # 20, 21, ... 59, as in NumPy
    clustering.method:                {choice: [cimc, kmeans]}    # any value of YAML
    sparse.sparsity:                  {grid: [0.5, 0.75, 0.9]}    # as choice; the axes of a grid
    pretrain.margin_settings.margin:
      uniform: [0.05, 0.3]
      also: [sparse.margin_settings.margin]                       # fields that get the same value

A search works on *codes*: a number for a range, an index for a list. So a list may hold anything,
and what Tune and Optuna see are plain numbers. `decode` makes a code the value of the field.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from goldcrest.cluster.api import canonical_json
from goldcrest.cluster.config_file import Tree, apply_override, read_yaml, validate
from goldcrest.cluster.errors import InputError

if TYPE_CHECKING:
    from ray.tune.search.sample import Domain

MAX_AXES = 64
"""Most axes of one space."""
_DIGITS = 6  # significant digits of a drawn number: enough for a search, readable in a YAML
_DRAWS = 100  # tries to draw a point that no earlier trial has

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Code = float | int
Codes = dict[str, Code]
Values = dict[str, Any]


class Axis(BaseModel):
    """What one field varies over: exactly one of the five kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uniform: tuple[float, float] | None = Field(None, description="lowest and highest number")
    loguniform: tuple[float, float] | None = Field(
        None, description="lowest and highest number, drawn evenly over the logarithm"
    )
    randint: tuple[int, int] | None = Field(
        None, description="lowest whole number, and the one after the highest"
    )
    choice: tuple[Any, ...] | None = Field(None, description="the values to choose from")
    grid: tuple[Any, ...] | None = Field(None, description="the values of an axis of a grid")
    also: tuple[str, ...] = Field((), description="further dotted paths that get the same value")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = self.model_dump(exclude_none=True, exclude={"also"})
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, loguniform, randint, choice, grid")
        if self.bounds is not None:
            low, high = self.bounds
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"the first bound must be below the second, not {low}, {high}")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform needs bounds above 0, not {low}")
        elif not self.listed:
            raise ValueError("give at least one value")
        elif len({canonical_json(value) for value in self.listed}) < len(self.listed):
            raise ValueError("a value is given twice")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both bounds of a range, None for a list."""
        return self.uniform or self.loguniform or self.randint

    @property
    def listed(self) -> tuple[Any, ...]:
        """The values of a list, () for a range."""
        return self.choice or self.grid or ()

    def domain(self) -> Domain:
        """The axis as Tune draws from it: numbers of the range, indices of the list."""
        from ray import tune

        if self.uniform:
            return tune.uniform(*self.uniform)
        if self.loguniform:
            return tune.loguniform(*self.loguniform)
        if self.randint:
            return tune.randint(*self.randint)
        return tune.choice(list(range(len(self.listed))))

    def decode(self, code: Code) -> Any:
        """The field's value behind a code."""
        if self.listed:
            return self.listed[int(code)]
        if self.randint:
            return int(code)
        low, high = self.bounds or (code, code)
        return min(max(float(f"{code:.{_DIGITS}g}"), low), high)

    def encode(self, value: Any) -> Code:
        """The code behind a value; ValueError where the axis has no such value."""
        if self.listed:
            same = canonical_json(value)
            return [canonical_json(other) for other in self.listed].index(same)
        low, high = self.bounds or (value, value)
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{value!r} is not between {low} and {high}")
        return value

    def ends(self) -> Sequence[Any]:
        """Values to check against the config class: all of a list, both ends of a range."""
        if self.listed:
            return self.listed
        low, high = self.bounds or (0, 0)
        return (low, int(high) - 1) if self.randint else (low, high)

    @property
    def size(self) -> float:
        """Number of different values, infinite for a range of numbers."""
        if self.listed:
            return len(self.listed)
        return self.randint[1] - self.randint[0] if self.randint else math.inf


@dataclass(frozen=True)
class Space:
    """The axes of a sweep by dotted path, in the order of the file."""

    axes: Mapping[str, Axis]
    where: str = "the space"

    @classmethod
    def load(cls, path: Path) -> Space:
        """Read a space; an InputError names the file, the axis and what is allowed."""
        return cls.parse(read_yaml(path), where=f"the space {path}")

    @classmethod
    def parse(cls, tree: Tree, *, where: str = "the space") -> Space:
        """A space from plain values `{path: {kind: [...]}}`."""
        if not tree:
            raise InputError(
                f"{where} has no axes", hint="write: field.subfield: {uniform: [0, 1]}"
            )
        if len(tree) > MAX_AXES:
            raise InputError(f"{where} has {len(tree)} axes; at most {MAX_AXES} are searched")
        axes: dict[str, Axis] = {}
        for path, given in tree.items():
            if not isinstance(given, dict):
                raise InputError(
                    f"{where}: '{path}' must say what it varies over, not {given!r}",
                    hint=f"write: {path}: {{uniform: [low, high]}}, or choice: [a, b]",
                )
            axes[path] = validate(Axis, given, where=f"{where}, '{path}'")
        paths = [name for path, axis in axes.items() for name in (path, *axis.also)]
        twice = next((name for name in paths if paths.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: the field '{twice}' is on two axes")
        return cls(axes, where)

    def apply(self, tree: Tree, values: Values) -> Tree:
        """A copy of a config's tree with the values of one point set."""
        made = copy.deepcopy(tree)
        for path, value in values.items():
            for field in (path, *self.axes[path].also):
                apply_override(made, field.split("."), copy.deepcopy(value))
        return made

    def check(self, config_class: type[BaseModel], tree: Tree, points: Sequence[Values]) -> None:
        """Refuse a space whose values the config class refuses, before anything starts.

        Every axis is tried at its ends (lists: at all values), the others at their first value;
        then every one of `points` as a whole.
        """
        first = {path: axis.ends()[0] for path, axis in self.axes.items()}
        for path, axis in self.axes.items():
            for value in axis.ends():
                where = f"{self.where}, '{path}' at {value!r}"
                self.configure(config_class, tree, {**first, path: value}, where=where)
        for point in points:
            at = ", ".join(f"{path}={value!r}" for path, value in point.items())
            self.configure(config_class, tree, point, where=f"{self.where} at {at}")

    def configure(
        self, config_class: type[ConfigT], tree: Tree, values: Values, *, where: str
    ) -> ConfigT:
        """The validated config of one point; InputError where the class refuses it."""
        try:
            return validate(config_class, self.apply(tree, values), where=where)
        except InputError as error:
            if error.message.startswith(where):
                raise
            raise InputError(f"{where}: {error.message}", hint=error.hint) from None

    # ------------------------------------------------------------------------------- points

    def decode(self, codes: Mapping[str, Code]) -> Values:
        """The values of a point of codes."""
        return {path: axis.decode(codes[path]) for path, axis in self.axes.items()}

    def encode(self, values: Mapping[str, Any]) -> Codes:
        """The codes of a point; ValueError or KeyError where this space has no such point."""
        return {path: axis.encode(values[path]) for path, axis in self.axes.items()}

    def draw(self, *seed: int) -> Values:
        """The random point that belongs to `seed`."""
        import numpy as np

        rng = np.random.default_rng(seed)
        codes = {path: axis.domain().sample(random_state=rng) for path, axis in self.axes.items()}
        return self.decode(codes)

    def random_points(self, count: int, seed: int) -> list[Values]:
        """`count` different random points; fewer where the space has no more.

        The n-th point depends on `seed` and n alone: a repeated or longer sweep begins the same.
        """
        points: dict[str, Values] = {}
        # The last of n points is missed by 25 n draws once in 70 billion times.
        draws = _DRAWS if 2 * count < self.size else max(_DRAWS, math.ceil(25 * self.size))
        for number in range(int(min(count, self.size))):
            drawn = (self.draw(seed, number, attempt) for attempt in range(draws))
            new = ((canonical_json(point), point) for point in drawn)
            found = next(((text, point) for text, point in new if text not in points), None)
            if found is not None:
                points[found[0]] = found[1]
        return list(points.values())

    def grid_points(self, count: int | None) -> list[Values]:
        """The first `count` points of the grid (None: all), the last axis fastest."""
        endless = [path for path, axis in self.axes.items() if not axis.listed]
        if endless:
            raise InputError(
                f"{self.where}: '{endless[0]}' is a range, and a grid needs lists",
                hint="write it as grid: [...], or use --search random",
            )
        product: Iterator[tuple[Any, ...]] = itertools.product(
            *(axis.listed for axis in self.axes.values())
        )
        points = itertools.islice(product, count)
        return [dict(zip(self.axes, point, strict=True)) for point in points]

    @property
    def size(self) -> float:
        """Number of different points, infinite where an axis is a range of numbers."""
        return math.prod(axis.size for axis in self.axes.values())

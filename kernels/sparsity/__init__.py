"""Pruning of trained layers; one method a file, found by its name.

A method is a file of this folder that defines `Settings` and
`prune(weight, hessian, *, sparsity, settings) -> (new_weight, mask)`; the other files are what
methods share: the layers' second moments, masks, the walk over a model, storage.

Masks are boolean, True where a weight stays.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Protocol, cast

from torch import Tensor


class PruningMethod(Protocol):
    """A method file."""

    Settings: type[Any]

    def prune(
        self, weight: Tensor, hessian: Tensor, *, sparsity: float, settings: Any
    ) -> tuple[Tensor, Tensor]:
        """New weight and mask, both shaped as `weight` (rows, columns)."""
        ...


def methods() -> tuple[str, ...]:
    """Names of the methods: the files of this folder that define `prune`, sorted."""
    names = [item.name for item in pkgutil.iter_modules(__path__)]
    return tuple(sorted(name for name in names if hasattr(_module(name), "prune")))


def load(method: str) -> PruningMethod:
    """The method file called `method`.

    Raises ValueError for a name without a file, naming those there are.
    """
    if method not in methods():
        raise ValueError(f"unknown pruning method '{method}'; there are {', '.join(methods())}")
    return cast(PruningMethod, _module(method))


def settings(method: str, values: Mapping[str, Any]) -> Any:
    """`values` (as read from a config) as the method's own `Settings`.

    Raises ValueError for an unknown method, an unknown field (with the nearest name and those
    allowed) or a value that the settings refuse.
    """
    factory = load(method).Settings
    allowed = [item.name for item in fields(factory)]
    for name in values:
        if name not in allowed:
            near = get_close_matches(name, allowed, 1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"pruning method '{method}' has no setting '{name}'{guess}"
                f" Allowed: {', '.join(allowed) or 'none'}"
            )
    return factory(**values)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")

"""Pruning of trained layers; one method a file, found by its name.

A method is a file of this folder that defines `Settings` and
`prune(weight, hessian, *, sparsity, settings) -> (new_weight, mask)`; the other files are what
methods share: the layers' second moments, masks, the walk over a model, storage.

Masks are boolean, True where a weight stays.
"""

from __future__ import annotations

import importlib
import pkgutil
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


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")

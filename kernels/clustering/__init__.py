"""Clustering of utterance vectors into pseudo-speakers; one method a file.

A method is a file of this folder that defines `Settings`, `fit` and `predict`; its file name is
its name, and that is all the registration there is. Parts that methods share (network, neighbours,
number of clusters, ...) are the files without a `fit`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import ModuleType
from typing import Any


def methods() -> tuple[str, ...]:
    """Names of the methods: the files of this folder that define `fit`, sorted."""
    names = [item.name for item in pkgutil.iter_modules(__path__) if not item.ispkg]
    return tuple(sorted(name for name in names if hasattr(_module(name), "fit")))


def load(method: str) -> ModuleType:
    """The module of `method`, with `Settings`, `fit` and `predict`.

    Raises ValueError for a name without a file, naming those there are.
    """
    if method not in methods():
        raise ValueError(f"unknown clustering method '{method}'; there are {', '.join(methods())}")
    return _module(method)


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
                f"clustering method '{method}' has no setting '{name}'{guess}"
                f" Allowed: {', '.join(allowed)}"
            )
    return factory(**values)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

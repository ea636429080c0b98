"""Clustering of utterance vectors into pseudo-speakers; one method a file.

A method is a file of this folder that defines `Settings`, `fit` and `predict`; its file name is
its name, and that is all the registration there is. One that is trained by gradients also says
`TRAINED = True` and gets a training engine as `train`. Parts that methods share (network,
neighbours, number of clusters, ...) are the files without a `fit`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


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


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

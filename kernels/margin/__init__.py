"""Classification losses for speaker embeddings, one file each; the file name is the method's name.

Every method file has a frozen dataclass `Settings` and a module `Head`; a file whose name starts
with an underscore is shared by methods and is not a method itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

from torch import Tensor, nn


class MarginHead(Protocol):
    """What every method's `Head(embedding_dim, classes, settings)` offers besides `nn.Module`."""

    def __call__(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean loss of embeddings (B, E) float with labels (B,) int64; without labels, `logits`.

        Both go through the module's call, where sharded training (ZeRO 3) gathers its weights.
        """
        ...

    def logits(self, embeddings: Tensor) -> Tensor:
        """Class scores (B, classes) without any margin, for accuracy and distillation."""
        ...


class MarginMethod(Protocol):
    """A method file: its settings and its head."""

    Settings: type[Any]
    Head: type[nn.Module]


def methods() -> list[str]:
    """Names of the methods there are: the files of this folder."""
    return sorted(
        found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")
    )


def load(method: str) -> MarginMethod:
    """The method file called `method`.

    Raises ValueError for a name that is not a file here, with the names that are.
    """
    if method not in methods():
        raise ValueError(
            f"margin loss '{method}' does not exist; there are: {', '.join(methods())}"
        )
    return cast(MarginMethod, importlib.import_module(f"{__name__}.{method}"))

"""Weight-only quantization to 2-8 bits in groups of input channels; one method a file.

A method is a file of this folder that defines `Settings`, `READS` and
`quantize(block, *, grid, settings, seed=0) -> {name: QuantizedWeight}`. All of them share the
grids of `grid` and see what they quantize as a `block.Block`: linear layers that are quantized
together, with what calibration shows of them. A single layer is a block of one.

The other files are what surrounds the methods: `folding` of input scales into the layer before,
`clipping` searches, `sensitivity` of layers, storage (`packing`, `gptq_layout`, `awq_layout`,
`checkpoint`), products with the codes (`matmul`, `torch_int4`) and the layer that takes them
(`linear`). `transformer` drives a method through a whole model, block after block, on what
`calibrated` collects; `search` finds the recipe that a model needs.

The family is apart from `quantization`, whose INT8 needs activations on grids too and an integer
network; here activations stay float.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import GridSettings, QuantizedWeight


class WeightOnlyMethod(Protocol):
    """A method file."""

    Settings: type[Any]
    READS: frozenset[str]
    """What it reads of a block's calibration: "hessians", "outputs" (`forward` and `targets`).

    Who builds blocks can spare the rest: H of a wide layer takes more memory than its weight.
    """

    def quantize(
        self, block: Block, *, grid: GridSettings, settings: Any, seed: int = 0
    ) -> dict[str, QuantizedWeight]:
        """Every weight of the block, quantized. The block is left as it was.

        The same block, settings and seed give the same codes on the same machine. Raises
        ValueError for weights that do not divide into groups or are not finite, and for a method
        that needs calibration where there is none.
        """
        ...


def methods() -> tuple[str, ...]:
    """Names of the methods: the files of this folder that define `Settings`, sorted."""
    names = [item.name for item in pkgutil.iter_modules(__path__)]
    return tuple(sorted(name for name in names if hasattr(_module(name), "Settings")))


def load(method: str) -> WeightOnlyMethod:
    """The method file called `method`.

    Raises ValueError for a name without a file, naming those there are.
    """
    if method not in methods():
        raise ValueError(f"unknown weight-only method '{method}'; there are {', '.join(methods())}")
    return cast(WeightOnlyMethod, _module(method))


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")

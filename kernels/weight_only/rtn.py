"""RTN: every weight to the nearest point of its group's grid. Needs no calibration.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2; the search
for a clipped range is that of the GPTQ authors' code (E. Frantar et al., ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from goldcrest.kernels.weight_only import clipping
from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import (
    GridSettings,
    QuantizedWeight,
    check_weight,
    group_columns,
    round_to_grid,
)

READS: frozenset[str] = frozenset()
"""What the method reads of a block's calibration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of RTN."""

    clip: bool = False  # shrink each group's range to 1, 0.99, .., 0.21 for least |w^ - w|^2.4


def quantize(
    block: Block, *, grid: GridSettings, settings: Settings, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Round the weights of a block; its calibration and `seed` are not used.

    Raises ValueError for weights that do not divide into groups or are not finite.
    """
    quantized = {}
    for name, weight in block.weights.items():
        check_weight(weight, grid)
        low = high = None
        if settings.clip:
            low, high = clipping.by_weight_error(
                group_columns(weight.float(), grid.group_size), grid
            )
        quantized[name] = round_to_grid(weight, grid, low=low, high=high)
    return quantized

"""Which layers of a block suffer most from low bits: candidates to keep in higher precision.

Source: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2 (operators
that fall back to high precision). One layer at a time is rounded to nearest, the others stay float.
"""

from __future__ import annotations

from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid


def output_errors(block: Block, grid: GridSettings, *, batch: int = 32) -> dict[str, float]:
    """The block's error over all samples with only that layer quantized, by name."""
    return {
        name: block.total_error({name: round_to_grid(weight, grid).effective()}, batch)
        for name, weight in block.weights.items()
    }


def rank(errors: dict[str, float]) -> list[str]:
    """Names, the largest error first; ties by name."""
    return sorted(errors, key=lambda name: (-errors[name], name))

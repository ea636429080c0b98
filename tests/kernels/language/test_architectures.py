"""What a configuration tells of its architecture."""

from __future__ import annotations

from typing import Any

import pytest

from goldcrest.kernels.language.architectures import longest_text, parse_config


@pytest.mark.parametrize(
    ("values", "longest"),
    [
        ({"model_type": "gpt2", "n_positions": 48}, 48),
        ({"model_type": "llama", "max_position_embeddings": 48}, 48),
        ({"model_type": "whisper", "max_target_positions": 48}, 48),
        ({"model_type": "t5", "n_positions": 48}, None),  # as T5's own files have it
        ({"model_type": "xlnet"}, None),  # whose class answers -1
    ],
)
def test_the_longest_text_is_what_the_architecture_has_positions_for(
    values: dict[str, Any], longest: int | None
) -> None:
    """A field that the architecture does not know says nothing: T5's positions are relative."""
    assert longest_text(parse_config(values)) == longest

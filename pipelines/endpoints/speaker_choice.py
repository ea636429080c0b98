"""Which bundles a speaker endpoint serves: the `user_config` of both of its deployments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from goldcrest.cluster.api import Config
from goldcrest.cluster.errors import InputError
from goldcrest.pipelines.endpoints.speaker_calibration import Calibration

ID = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"  # of speakers and of models


class ModelChoice(Config):
    """Which bundles are served, and from which score a speaker is accepted."""

    bundles: dict[Annotated[str, Field(pattern=ID)], Path] = Field(
        min_length=1, max_length=16, description="name -> folder; the first is the default"
    )
    threshold: float | None = Field(
        None, ge=-1, le=1, description="accept from this score, whatever the calibration says"
    )
    far: float | None = Field(
        None, gt=0, lt=1, description="accept at this false-accept rate [default: at the EER]"
    )

    def threshold_of(self, folder: Path, calibration: Calibration | None) -> float:
        """The threshold of one bundle; InputError where nothing tells it."""
        if self.threshold is not None:
            return self.threshold
        if calibration is None:
            raise InputError(
                f"the bundle {folder} has no calibration.json",
                hint="say with --threshold from which score a speaker is accepted",
            )
        return calibration.threshold(self.far)


def read_choice(user_config: Mapping[str, Any]) -> ModelChoice:
    """The choice that a `user_config` holds, or that the file lies in which it names."""
    if set(user_config) != {"file"}:
        return ModelChoice.model_validate(user_config)
    return ModelChoice.model_validate_json(Path(user_config["file"]).read_text("utf-8"))

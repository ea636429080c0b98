"""Which bundles a speaker endpoint serves: the `user_config` of both of its deployments."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from goldcrest.cluster.errors import InputError
from goldcrest.pipelines.endpoints.bundles import BundleChoice
from goldcrest.pipelines.endpoints.speaker_calibration import Calibration, read_calibration
from goldcrest.tasks.speaker.bundle import read_description


class ModelChoice(BundleChoice):
    """Which bundles are served, and from which score a speaker is accepted."""

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


def check_choice(choice: ModelChoice) -> None:
    """InputError where a bundle is none, or where nothing says when its speakers are accepted."""
    for folder in choice.bundles.values():
        system = str(read_description(folder)["name"])
        choice.threshold_of(folder, read_calibration(folder, system=system))

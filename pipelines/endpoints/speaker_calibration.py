"""A bundle's calibration.json: which score accepts a speaker, measured on labelled trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from goldcrest.cluster.api import Config
from goldcrest.cluster.errors import InputError

FILE = "calibration.json"
_MAX_BYTES = 1 << 20

Score = Annotated[float, Field(ge=-1.001, le=1.001, allow_inf_nan=False)]  # a cosine


class Histogram(Config):
    """Scores of the trials in bins: `edges` has one number more than the counts."""

    edges: tuple[Score, ...] = Field(min_length=2, max_length=1001, description="ascending")
    target: tuple[Annotated[int, Field(ge=0)], ...] = Field(description="same-speaker trials")
    nontarget: tuple[Annotated[int, Field(ge=0)], ...] = Field(description="other trials")

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        bins = len(self.edges) - 1
        if {len(self.target), len(self.nontarget)} != {bins}:
            raise ValueError(f"{bins + 1} edges want {bins} counts of each kind")
        if list(self.edges) != sorted(self.edges):
            raise ValueError("the edges must ascend")
        return self


class Calibration(Config):
    """Thresholds of one system for plain cosine scores."""

    system: str = Field(description="the bundle's name")
    score: Literal["cosine"] = Field(description="what is thresholded")
    eer: float = Field(ge=0, le=100, description="equal error rate, percent")
    trials: int = Field(ge=1, description="how many trials this rests on")
    thresholds: dict[str, Score] = Field(description="`eer` and `far_RATE` -> score")
    histogram: Histogram | None = None

    def threshold(self, far: float | None = None) -> float:
        """The score from which a speaker is accepted: at the EER, or at a false-accept rate."""
        if far is None:
            return self.thresholds["eer"]
        name = f"far_{far:g}"
        if name not in self.thresholds:
            known = ", ".join(sorted(n.removeprefix("far_") for n in self.thresholds if n != "eer"))
            raise InputError(
                f"the bundle's calibration has no threshold for a false-accept rate of {far:g}",
                hint=f"it has {known or 'none'}; or give --threshold",
            )
        return self.thresholds[name]

    @model_validator(mode="after")
    def _has_eer(self) -> Calibration:
        if "eer" not in self.thresholds:
            raise ValueError("thresholds lacks 'eer'")
        return self


def read_calibration(folder: Path, *, system: str) -> Calibration | None:
    """The calibration in a bundle's folder; None if there is none, InputError if it is unusable."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MiB")
        found = Calibration.model_validate(json.loads(content))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} can't be used: {reason}") from None
    if found.system != system:
        raise InputError(f"{path} was measured on '{found.system}', the bundle is '{system}'")
    return found

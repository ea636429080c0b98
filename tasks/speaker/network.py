"""Shared configuration of the steps that train the speaker network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from goldcrest.cluster.api import Config
from goldcrest.tasks.methods import SettingsOf, complete_method, remembered, settings_of

if TYPE_CHECKING:
    from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn

MARGINS = "goldcrest.kernels.margin"
_ECAPA = "goldcrest.kernels.speaker.ecapa_tdnn"
_SPECAUGMENT = "goldcrest.kernels.frontend.specaugment"


class LossConfig(Config):
    """What a training example looks like and what is minimised over it."""

    margin: str = Field("aam", description="classification loss, a file of kernels/margin")
    margin_settings: dict[str, Any] = Field({}, description="scale and margin (see its file)")
    margin_warmup: int = Field(
        0, ge=0, description="epochs over which the margin grows from 0 to its value"
    )
    crop_frames: tuple[int, int] = Field(
        (200, 200), description="range of a batch's crop length in frames (10 ms each)"
    )
    specaugment: Annotated[dict[str, Any], SettingsOf(_SPECAUGMENT, "SpecAugmentSettings")] = Field(
        {}, description="time and frequency masks on training crops"
    )
    weight_decay_head: float = Field(2e-4, ge=0, description="weight decay of the classifier")
    balance: float = Field(
        0.0, ge=0, le=1, description="0: examples as they come; 1: every class equally often"
    )

    @field_validator("crop_frames")
    @classmethod
    def _a_range(cls, crop: tuple[int, int]) -> tuple[int, int]:
        if not 5 <= crop[0] <= crop[1]:
            raise ValueError(f"crop_frames must be [least, most] with 5 <= least, not {crop}")
        return crop

    @model_validator(mode="after")
    def _complete(self) -> Self:
        completed = complete_method(MARGINS, self.margin, self.margin_settings)
        object.__setattr__(self, "margin_settings", completed)
        if self.margin_warmup and "margin" not in completed:
            raise ValueError(
                f"margin_warmup is {self.margin_warmup}, but the loss '{self.margin}' has no "
                "setting 'margin' that could grow: leave it at 0"
            )
        return self

    def objective_settings(self) -> dict[str, Any]:
        """The keyword arguments of `SpeakerObjective` that this config decides."""
        return {
            "margin": self.margin,
            "margin_settings": settings_of(
                f"{MARGINS}.{self.margin}", "Settings", self.margin_settings
            ),
            "margin_warmup": self.margin_warmup,
            "crop_frames": self.crop_frames,
            "augment": settings_of(_SPECAUGMENT, "SpecAugmentSettings", self.specaugment),
            "weight_decay_head": self.weight_decay_head,
            "balance": self.balance,
        }


NetworkSettings = Annotated[dict[str, Any], SettingsOf(_ECAPA, "EcapaSettings")]
"""Config field type: the settings of an ECAPA-TDNN, completed."""


def network_settings(given: dict[str, Any]) -> Any:
    """`EcapaSettings` of completed values."""
    return settings_of(_ECAPA, "EcapaSettings", given)


def check_pruning_skips(network: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError for a name that is no layer (or module) of the network of completed settings."""

    def ask() -> bool:
        from goldcrest.kernels.sparsity.model import prunable

        prunable(_bare_network(network), names)
        return True

    if names:
        question = ["pruning skips", network, list(names)]
        remembered(question, [_ECAPA, "goldcrest.kernels.sparsity.model"], ask)


def check_int8_skips(network: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError for a name that is no operation of the network that may stay float32."""

    def ask() -> bool:
        from goldcrest.kernels.quantization.quantize_ecapa import check_skip_names

        check_skip_names(_bare_network(network), names)
        return True

    if names:
        question = ["int8 skips", network, list(names)]
        remembered(question, [_ECAPA, "goldcrest.kernels.quantization.quantize_ecapa"], ask)


def _bare_network(network: dict[str, Any]) -> EcapaTdnn:
    """The network without weights: its layers have their names."""
    import torch

    from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn

    with torch.device("meta"):
        return EcapaTdnn(network_settings(network))

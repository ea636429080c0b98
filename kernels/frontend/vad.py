"""Energy-based voice activity detection.

Source: Kaldi `ivector/voice-activity-detection.cc`; spec: threshold = 5.5 + 0.5 mean(log energy).
Frame t is speech where at least a share `proportion` of the frames within `context` frames of it
(fewer at the edges) lies above the threshold.

    T frames; log energy on the 16-bit scale (see `frames.FrameSettings.sample_scale`)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["VadSettings", "energy_vad", "energy_vad_reference"]


@dataclass(frozen=True, kw_only=True)
class VadSettings:
    """Energy VAD of the VoxCeleb recipe."""

    energy_threshold: float = 5.5
    """Constant part of the threshold, natural log of 16-bit energy."""
    mean_scale: float = 0.5
    """Share of the utterance's mean log energy added to the threshold."""
    context: int = 0
    """Frames on each side that vote on a frame; 0 in the VoxCeleb configuration."""
    proportion: float = 0.6
    """Share of the voters that must lie above the threshold."""

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(f"context must be 0 or more frames, not {self.context}")
        if not 0.0 < self.proportion <= 1.0:
            raise ValueError(f"proportion must lie in (0, 1], not {self.proportion}")
        if self.mean_scale < 0:
            raise ValueError(f"mean_scale must be 0 or more, not {self.mean_scale}")


def energy_vad(log_energy: Tensor, settings: VadSettings) -> Tensor:
    """Which frames are speech: (T,) float -> (T,) bool.

    Raises:
        ValueError: `log_energy` is not a vector.
    """
    if log_energy.ndim != 1:
        raise ValueError(f"log_energy must be (frames,), not {tuple(log_energy.shape)}")
    frames = log_energy.shape[0]
    if frames == 0:
        return torch.zeros(0, dtype=torch.bool, device=log_energy.device)
    above = log_energy.double() > _threshold(log_energy, settings)
    votes = torch.zeros(frames + 1, dtype=torch.long, device=log_energy.device)
    votes[1:] = above.cumsum(0)
    t = torch.arange(frames, device=log_energy.device)
    start = (t - settings.context).clamp_min(0)
    end = (t + settings.context + 1).clamp_max(frames)
    return (votes[end] - votes[start]) >= settings.proportion * (end - start)


def energy_vad_reference(log_energy: Tensor, settings: VadSettings) -> Tensor:
    """Plain twin of `energy_vad`: frame by frame."""
    frames = log_energy.shape[0]
    out = torch.zeros(frames, dtype=torch.bool)
    if frames == 0:
        return out
    threshold = _threshold(log_energy, settings)
    for t in range(frames):
        voters = range(max(0, t - settings.context), min(frames, t + settings.context + 1))
        above = sum(float(log_energy[v]) > threshold for v in voters)
        out[t] = above >= settings.proportion * len(voters)
    return out


def _threshold(log_energy: Tensor, settings: VadSettings) -> float:
    mean = float(log_energy.double().mean())
    return settings.energy_threshold + settings.mean_scale * mean

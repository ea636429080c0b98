"""The speaker front end: one waveform -> MFCC (for i-vectors) or filterbank (for the network).

The same code runs in training, evaluation and serving; bundles carry its config.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from goldcrest.cluster.api import Config
from goldcrest.tasks.methods import SettingsOf, settings_of

_FRONTEND = "goldcrest.kernels.frontend"
MIN_SPEECH_FRAMES = 5  # with fewer the detector has failed, and all frames are better than none

Normalisation = Literal["none", "utterance", "sliding"]


class FrontEndConfig(Config):
    """MFCC and log-mel filterbank of 16 kHz speech."""

    mfcc: Annotated[dict[str, Any], SettingsOf(f"{_FRONTEND}.mfcc", "MfccSettings")] = Field(
        {}, description="MFCC of the i-vector system"
    )
    deltas: int = Field(2, ge=0, le=2, description="order of differences appended to the MFCC")
    delta_window: int = Field(3, ge=1, description="frames on each side of a difference")
    normalisation: Normalisation = Field(
        "sliding", description="mean subtraction of the MFCC: none, whole utterance, sliding window"
    )
    mean_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of that mean which is subtracted from the MFCC; below 1 keeps some of "
        "the voice's own average, which short utterances lose with the channel's",
    )
    window: int = Field(300, ge=1, description="frames of the sliding window")
    vad: Annotated[dict[str, Any], SettingsOf(f"{_FRONTEND}.vad", "VadSettings")] = Field(
        {}, description="which frames are speech; only those enter the i-vectors"
    )
    fbank: Annotated[dict[str, Any], SettingsOf(f"{_FRONTEND}.log_mel", "LogMelSettings")] = Field(
        {"mel_bins": 40, "window": "hamming"}, description="log-mel filterbank of the network"
    )
    network_input: Literal["fbank", "mfcc"] = Field(
        "fbank", description="what the network sees: log-mel filterbank, or MFCC (chapter 10)"
    )
    network_mfcc: Annotated[dict[str, Any], SettingsOf(f"{_FRONTEND}.mfcc", "MfccSettings")] = (
        Field(
            {"coefficients": 40, "mel_bins": 40, "window": "hamming", "use_energy": False},
            description="MFCC of the network, where that is its input",
        )
    )
    fbank_mean_share: float = Field(
        1.0, ge=0, le=1, description="share of the utterance's mean subtracted from that input"
    )
    fbank_offset: float = Field(
        0.0, description="constant subtracted from that input (log-mel: natural log, 16-bit scale)"
    )
    fbank_scale: float = Field(1.0, gt=0, description="divisor of that input after the offset")

    @property
    def mfcc_dimensions(self) -> int:
        """Features per MFCC frame, deltas included."""
        return int(self.mfcc["coefficients"]) * (self.deltas + 1)

    @property
    def network_dimensions(self) -> int:
        """Features per frame of the network's input."""
        if self.network_input == "mfcc":
            return int(self.network_mfcc["coefficients"])
        return int(self.fbank["mel_bins"])


class FrontEnd:
    """The front end ready to run on waveforms (N,) float32 in [-1, 1] at 16 kHz."""

    def __init__(self, cfg: FrontEndConfig) -> None:
        self._cfg = cfg
        self._mfcc = settings_of(f"{_FRONTEND}.mfcc", "MfccSettings", cfg.mfcc)
        self._fbank = settings_of(f"{_FRONTEND}.log_mel", "LogMelSettings", cfg.fbank)
        self._network_mfcc = settings_of(f"{_FRONTEND}.mfcc", "MfccSettings", cfg.network_mfcc)
        self._vad = settings_of(f"{_FRONTEND}.vad", "VadSettings", cfg.vad)
        energy = {**cfg.mfcc, "use_energy": True}
        self._energy = settings_of(f"{_FRONTEND}.mfcc", "MfccSettings", energy)

    def speech(self, samples: np.ndarray) -> np.ndarray:
        """(T,) bool: which frames are speech."""
        import torch

        from goldcrest.kernels.frontend.mfcc import mfcc
        from goldcrest.kernels.frontend.vad import energy_vad

        energy = mfcc(torch.from_numpy(samples)[None], None, self._energy)[0, :, 0]
        return energy_vad(energy, self._vad).numpy()

    def mfcc(self, samples: np.ndarray, speech: np.ndarray | None = None) -> np.ndarray:
        """(T', C (deltas + 1)) float32: normalised MFCC with deltas at the speech frames."""
        import torch

        from goldcrest.kernels.frontend import cmvn
        from goldcrest.kernels.frontend.deltas import add_deltas
        from goldcrest.kernels.frontend.mfcc import mfcc

        speech = self.speech(samples) if speech is None else speech
        frames = mfcc(torch.from_numpy(samples)[None], None, self._mfcc)[0]
        if self._cfg.deltas:
            frames = add_deltas(frames, order=self._cfg.deltas, window=self._cfg.delta_window)
        if self._cfg.normalisation == "sliding":
            frames = cmvn.sliding_cmn(frames, self._cfg.window, strength=self._cfg.mean_share)
        elif self._cfg.normalisation == "utterance":
            frames = cmvn.global_cmvn(frames, strength=self._cfg.mean_share)
        # A copy at another speed has other frames than the clean one that `speech` comes from.
        kept = np.interp(
            np.linspace(0.0, 1.0, len(frames)), np.linspace(0.0, 1.0, len(speech)), speech
        )
        chosen = kept >= 0.5
        return frames.numpy()[chosen] if chosen.sum() >= MIN_SPEECH_FRAMES else frames.numpy()

    def fbank(self, samples: np.ndarray) -> np.ndarray:
        """(T, F) float32, the network's input: shifted, scaled, (partly) mean-subtracted."""
        import torch

        from goldcrest.kernels.frontend.cmvn import global_cmvn
        from goldcrest.kernels.frontend.log_mel import log_mel
        from goldcrest.kernels.frontend.mfcc import mfcc

        waveform = torch.from_numpy(samples)[None]
        if self._cfg.network_input == "mfcc":
            frames = mfcc(waveform, None, self._network_mfcc)[0]
        else:
            frames = log_mel(waveform, None, self._fbank)[0]
        frames = (frames - self._cfg.fbank_offset) / self._cfg.fbank_scale
        return global_cmvn(frames, strength=self._cfg.fbank_mean_share).numpy()

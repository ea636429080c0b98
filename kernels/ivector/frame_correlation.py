"""How many frames make one independent observation: the scale of the statistics, without labels.

Source: Sokal, "Monte Carlo methods in statistical mechanics" (1997), integrated autocorrelation
time; Geyer (1992), summation up to the first lag that is not positive.

The i-vector posterior treats frames as independent. Frames 10 ms apart overlap and belong to the
same sound, so that n frames carry the evidence of n / tau independent ones,

    tau = 1 + 2 sum_{k >= 1} rho_k,   rho_k = autocorrelation of the features at lag k frames

and `StatisticsSettings.scale` = 1 / tau puts that right. tau near 10 to 12 is usual for MFCC at a
10 ms shift: a phone's length.

    T frames   D feature dimensions   K lags
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["autocorrelation", "correlation_time"]


def autocorrelation(utterances: Sequence[Tensor], *, lags: int = 60) -> Tensor:
    """Autocorrelation of features within utterances, averaged over dimensions: (K + 1,) float64.

    Every dimension is centred per utterance and counted with the variance it has over all of them,
    so that the scale of a dimension does not matter. Entry 0 is 1.

    Args:
        utterances: matrices (T_n, D) float; those with fewer than two frames are passed over.
        lags: K, largest lag in frames; longer than a syllable.

    Raises:
        ValueError: no utterance of two frames or more, no variance at all, or lags < 1.
    """
    if lags < 1:
        raise ValueError(f"lags must be at least 1, not {lags}")
    centred = [u.double() - u.double().mean(0) for u in utterances if u.shape[0] > 1]
    if not centred:
        raise ValueError("the correlation of frames needs an utterance of two frames or more")
    variance = torch.cat(centred).square().mean(0)
    varying = variance > 0
    if not bool(varying.any()):
        raise ValueError("the features do not vary within any utterance; check the front end")
    products = torch.zeros(lags + 1, dtype=torch.float64)
    pairs = torch.zeros(lags + 1, dtype=torch.float64)
    for x in centred:
        white = x[:, varying] / variance[varying].sqrt()
        frames, dimensions = white.shape
        # Wiener-Khinchin: all lags by one FFT, zero-padded so that it does not wrap around.
        power = torch.fft.rfft(white, n=2 * frames, dim=0).abs().square()
        sums = torch.fft.irfft(power, n=2 * frames, dim=0).sum(1)
        reach = min(lags + 1, frames)
        products[:reach] += sums[:reach].cpu()
        pairs[:reach] += dimensions * torch.arange(frames, frames - reach, -1).double()
    mean = products / pairs.clamp_min(1.0)
    return mean / mean[0]


def correlation_time(utterances: Sequence[Tensor], *, lags: int = 60) -> float:
    """Integrated autocorrelation time tau in frames, at least 1; 1 / tau is the scale to use.

    Raises:
        ValueError: as `autocorrelation`.
    """
    rho = autocorrelation(utterances, lags=lags)[1:]
    ends = (rho <= 0).nonzero()
    stop = int(ends[0, 0]) if ends.numel() else rho.shape[0]
    return 1.0 + 2.0 * float(rho[:stop].sum())

"""Observers: what calibration batches show of an activation, streamed.

Each observer takes batch after batch of any shape and two of them merge, so calibration may be
spread over workers. Sources: B. Jacob et al., CVPR 2018, section 3 (ranges); P. Pebay, "Formulas
for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical Moments",
2008, equations (1.5)-(1.6) (moments).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RangeObserver(Protocol):
    """Finds the range that a grid has to cover."""

    def observe(self, x: Tensor) -> None:
        """Take a batch of activations, any shape."""
        ...

    def range(self) -> tuple[float, float]:
        """(low, high). Raises ValueError before anything was observed."""
        ...


class MinMax:
    """The smallest and largest value seen."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")

    def observe(self, x: Tensor) -> None:
        """Take a batch. Raises ValueError for NaN or infinite values."""
        _check(x)
        if x.numel():
            low, high = torch.aminmax(x)
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: MinMax) -> None:
        """Take what another observer has seen."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self) -> tuple[float, float]:
        """(low, high). Raises ValueError before anything was observed."""
        if self.low > self.high:
            raise ValueError("no activation was observed")
        return self.low, self.high


class Percentile:
    """The range that leaves out a share of the values, half of it at each end.

    Values are counted in the 65,536 buckets of bfloat16, which needs no range in advance, keeps a
    relative precision of 1/256, and merges by addition.
    """

    def __init__(self, share: float = 0.9999) -> None:
        """`share` of the values, in (0, 1], lies inside the range."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], not {share}")
        self.share = share
        self.counts = torch.zeros(1 << 16, dtype=torch.int64)

    def observe(self, x: Tensor) -> None:
        """Take a batch. Raises ValueError for NaN or infinite values."""
        _check(x)
        # Bits of a float in sign and magnitude -> a whole number that rises with the value.
        bits = x.detach().reshape(-1).to(torch.bfloat16).view(torch.int16).long()
        rank = torch.where(bits < 0, -(bits & 0x7FFF), bits) + 0x8000
        self.counts += torch.bincount(rank, minlength=1 << 16)

    def merge(self, other: Percentile) -> None:
        """Take what another observer has seen."""
        self.counts += other.counts

    def range(self) -> tuple[float, float]:
        """(low, high). Raises ValueError before anything was observed."""
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError("no activation was observed")
        outside = int((1 - self.share) / 2 * total)
        from_below = self.counts.cumsum(0)
        from_above = self.counts.flip(0).cumsum(0)
        low = int((from_below > outside).nonzero()[0])
        high = 0xFFFF - int((from_above > outside).nonzero()[0])
        return _value_of_rank(low), _value_of_rank(high)


def _value_of_rank(rank: int) -> float:
    signed = rank - 0x8000
    magnitude = torch.tensor(abs(signed), dtype=torch.int32).to(torch.int16)
    value = float(magnitude.view(torch.bfloat16))
    return -value if signed < 0 else value


class Moments:
    """Mean and central moments up to the fourth over all entries, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0  # sum (x - mean)^2
        self.m3 = 0.0
        self.m4 = 0.0
        self.largest = 0.0  # max |x|

    def observe(self, x: Tensor) -> None:
        """Take a batch. Raises ValueError for NaN or infinite values."""
        _check(x)
        if x.numel() == 0:
            return
        values = x.detach().double().reshape(-1)
        batch = Moments()
        batch.count = values.numel()
        batch.mean = float(values.mean())
        centred = values - batch.mean
        square = centred * centred
        batch.m2, batch.m3 = float(square.sum()), float((square * centred).sum())
        batch.m4 = float((square * square).sum())
        batch.largest = float(values.abs().max())
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Take what another observer has seen."""
        a, b = self.count, other.count
        if b == 0:
            return
        n, d = a + b, other.mean - self.mean
        self.m4 = (
            self.m4 + other.m4 + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d * d * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * d * (a * other.m3 - b * self.m3) / n
        )  # fmt: skip
        self.m3 = (
            self.m3 + other.m3 + d**3 * a * b * (a - b) / n**2
            + 3 * d * (a * other.m2 - b * self.m2) / n
        )  # fmt: skip
        self.m2 += other.m2 + d * d * a * b / n
        self.mean += d * b / n
        self.count = n
        self.largest = max(self.largest, other.largest)

    def kurtosis(self) -> float:
        """E[(x - mu)^4] / E[(x - mu)^2]^2: 3 for a normal distribution, 0 for a constant."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 else 0.0


class ChannelMax:
    """max |x| of each channel, for smoothing."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take activations (N, ...channels). Raises ValueError for NaN or infinite values."""
        _check(x)
        largest = x.detach().abs().amax(dim=0)
        self._largest = largest if self._largest is None else self._largest.maximum(largest)

    def largest(self) -> Tensor:
        """(...channels). Raises ValueError before anything was observed."""
        if self._largest is None:
            raise ValueError("no activation was observed")
        return self._largest


class ChannelPercentile:
    """`ChannelMax` without the tail: |x| of each channel that a share of its values stays within.

    Magnitudes are counted in buckets of 1/32 of their power of two, in 2^-20..2^12, what lies
    outside in the first and the last. The upper edge of a bucket counts, so the share is inside,
    but never more than was seen.
    """

    def __init__(self, share: float = 0.9999) -> None:
        """`share` of a channel's values, in (0, 1], lies within."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], not {share}")
        self.share = share
        self._max = ChannelMax()
        self._counts = torch.zeros(0, dtype=torch.int64)  # (channels, buckets)

    def observe(self, x: Tensor) -> None:
        """Take activations (N, ...channels). Raises ValueError for NaN or infinite values."""
        self._max.observe(x)
        channels = x.detach().abs().float().flatten(1)
        # Of a positive float32, bits 18 to 31: the exponent and five bits of the fraction.
        buckets = (channels.view(torch.int32).long() >> 18) - _FIRST_BUCKET
        buckets = buckets.clamp_(0, _BUCKETS - 1)
        buckets += _BUCKETS * torch.arange(channels.shape[1], device=x.device)
        size = channels.shape[1] * _BUCKETS
        found = torch.bincount(buckets.reshape(-1), minlength=size).reshape(-1, _BUCKETS)
        self._counts = self._counts + found if len(self._counts) else found

    def largest(self) -> Tensor:
        """(...channels). Raises ValueError before anything was observed."""
        largest = self._max.largest()
        total = int(self._counts[0].sum())
        inside = total - int((1 - self.share) * total)
        place = (self._counts.cumsum(1) < inside).sum(1)
        edges = ((place + 1 + _FIRST_BUCKET) << 18).int().view(torch.float32)
        edges = edges.masked_fill(place == _BUCKETS - 1, torch.inf)
        return edges.reshape(largest.shape).minimum(largest)


_BUCKETS = 32 * 32
_FIRST_BUCKET = (127 - 20) * 32  # of 2^-20


def _check(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("activations hold NaN or infinite values; look at the calibration inputs")

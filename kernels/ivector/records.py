"""Records of tensors: what models and accumulators of this family are made of.

A model is written as a flat `dict[str, Tensor]` (safetensors) and read back; accumulators of
shards of the data are added field by field, in any tree, and equal one pass over all of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Self, TypeVar

from torch import Tensor

__all__ = ["Accumulator", "TensorRecord", "merge", "merge_all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A frozen dataclass whose fields are tensors, or None where a field is optional."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The fields by name; fields that are None are left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The record that `to_tensors` wrote.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        unknown, missing = sorted(set(tensors) - names), sorted(names - optional - set(tensors))
        if unknown or missing:
            raise ValueError(
                f"not the tensors of a {cls.__name__}: unknown {unknown}, missing {missing}"
            )
        return cls(**tensors)

    def to(self, device: str) -> Self:
        """The record with its tensors on `device`."""
        return type(self)(**{name: value.to(device) for name, value in self.to_tensors().items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulator(TensorRecord):
    """A record of sums over data, so that adding two records is adding their data."""


A = TypeVar("A", bound=Accumulator)


def merge(a: A, b: A) -> A:
    """The accumulator of both parts of the data, added field by field.

    Raises:
        ValueError: different kinds, different shapes, or a sum that only one of them kept.
    """
    if type(a) is not type(b):
        raise ValueError(f"cannot merge {type(a).__name__} with {type(b).__name__}")
    left, right = a.to_tensors(), b.to_tensors()
    if left.keys() != right.keys():
        raise ValueError(f"only one of the two kept {sorted(left.keys() ^ right.keys())}")
    for name in left:
        if left[name].shape != right[name].shape:
            raise ValueError(
                f"'{name}' is {tuple(left[name].shape)} in one and "
                f"{tuple(right[name].shape)} in the other: they belong to different models"
            )
    return type(a)(**{name: left[name] + right[name] for name in left})


def merge_all(parts: Iterable[A]) -> A:
    """`merge` over any number of parts, at least one."""
    return functools.reduce(merge, parts)

"""A device that no machine has: which tensors would lie on it, and what a real one would refuse.

Numbers stay in the CPU's memory and are computed there, so that results can be compared bit by
bit; every operation is watched. One that mixes tensors of both places raises, as torch does for
a GPU: but for numbers without axes, indices, and copies.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goldcrest.kernels.language import offloading

HOME, AWAY = "cpu", "cuda"


class Elsewhere(TorchDispatchMode):
    """While it is open, `offloading` moves tensors to AWAY and back. What was made without a tensor
    (`torch.zeros`) may lie in either place: only what is known is checked."""

    def __init__(self, model: nn.Module, given: Any, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.model = model
        self.places: dict[int, str] = {}
        self.computed: defaultdict[str, set[str | None]] = defaultdict(set)
        self.peak = 0  # parameters that were away at one time
        self._kept: list[Any] = []  # storages, so that no address is used twice
        for each in (*model.parameters(), *model.buffers(), *tree_leaves(given)):
            if isinstance(each, Tensor):
                self._tag(each, HOME)
        patch.setattr(offloading, "put", self.put)
        patch.setattr(offloading, "_sent", self.sent)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        free = name in ("index", "index_put_", "copy_")
        given = args[:1] if free else (args, kwargs)
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        places = {self.place(each) for each in tensors if each.ndim or free} - {None}
        if len(places) > 1:
            raise AssertionError(f"{name} mixes tensors of two devices")
        place = places.pop() if places else None
        self.computed[name].add(place)
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and place is not None and self.place(each) is None:
                self._tag(each, place)
        return made

    def place(self, tensor: Tensor) -> str | None:
        """Where a tensor lies, if that is known."""
        return self.places.get(tensor.untyped_storage()._cdata)

    def sent(self, tensor: Tensor, device: torch.device) -> Tensor:
        """`offloading._sent`: a copy on the other device."""
        if self.place(tensor) == device.type:
            return tensor
        with torch.utils._python_dispatch._disable_current_modes():
            copy = tensor.detach().clone()
        self._tag(copy, device.type)
        return copy

    def put(self, module: nn.Module, device: torch.device) -> None:
        """`offloading.put`."""
        for parameter in module.parameters():
            parameter.data = self.sent(parameter.data, device)
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, self.sent(buffer, device))
        self.peak = max(self.peak, self.away())

    def away(self) -> int:
        """Parameters of the model that are away now."""
        return sum(each.numel() for each in self.model.parameters() if self.place(each) == AWAY)

    def _tag(self, tensor: Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self.places[storage._cdata] = place

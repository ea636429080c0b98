"""Blocks that compute on a GPU, one at a time, while the model stays in the CPU's memory.

Source: E. Frantar, D. Alistarh, "SparseGPT", ICML 2023, section 4: a model that no GPU holds is
compressed on one, as only one block is needed at a time.

    with Visits(blocks, "cuda") as visits:      # "cpu" where the model lies there: changes nothing
        model(...)                              # each block goes there for its call and back
        with visits.staying(block):             # and here for all calls
            ...

A call's tensors go with the block, and what it gives comes back, so whoever calls blocks needs to
know nothing of it; hooks inside a block see tensors of the GPU. Products of float32 are exact ones
meanwhile: TF32 has 10 bits of fraction, too few for a Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

Device = torch.device | str


def moved(value: Any, device: Device) -> Any:
    """The tensors in a call's arguments or result on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return _sent(value, device)
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    if isinstance(value, dict):  # of transformers' outputs too
        return type(value)(**{name: moved(each, device) for name, each in value.items()})
    return value


def _sent(tensor: Tensor, device: Device) -> Tensor:
    return tensor.to(device)


def put(module: nn.Module, device: Device) -> None:
    """A module's parameters and buffers on a device, in place."""
    module.to(device)


class Visits:
    """While it is open, the given blocks compute on `device`; nothing is done for their own."""

    def __init__(self, blocks: Sequence[nn.Module], device: Device) -> None:
        self.blocks, self.device = blocks, torch.device(device)
        self.home = next(blocks[0].parameters()).device
        self._staying: nn.Module | None = None
        self._left_behind: list[tuple[nn.Parameter, Tensor]] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self.device != self.home:
            self._open.enter_context(_exact_products())
            for block in self.blocks:
                self._open.callback(put, block, self.home)  # wherever an error left it
                arriving = block.register_forward_pre_hook(self._arrive, with_kwargs=True)
                leaving = block.register_forward_hook(self._leave)
                self._open.callback(arriving.remove)
                self._open.callback(leaving.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextmanager
    def staying(self, block: nn.Module) -> Iterator[None]:
        """Keep one block's weights on the device for several calls; as changed, they come back."""
        if self.device == self.home:
            yield
            return
        put(block, self.device)
        self._staying = block
        try:
            yield
        finally:
            self._staying = None
            put(block, self.home)

    def _arrive(
        self, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, Any]:
        if block is not self._staying:
            # A call changes no weight: what is left behind is what the block finds again.
            self._left_behind = [(each, each.data) for each in block.parameters()]
            put(block, self.device)
        return moved(arguments, self.device), moved(keywords, self.device)

    def _leave(self, block: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if block is not self._staying:
            for parameter, data in self._left_behind:
                parameter.data = data
            self._left_behind = []
            put(block, self.home)  # its buffers
        return moved(output, self.home)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever was chosen for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

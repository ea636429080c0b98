"""Where the fp32 weights and optimizer state of each parameter lie on this worker.

DeepSpeed spreads master weights over workers and flattens them: ZeRO 1 and 2 cut each group's flat
tensor into one partition per worker, ZeRO 3 cuts every parameter. This file is the one place that
knows those layouts. It gives each worker a list of `Fragment`s: the pieces of named parameters that
it holds, as views on DeepSpeed's own tensors. Checkpoints are written and read through fragments,
so a checkpoint does not depend on the stage or on the number of workers that wrote it.

    parameter "w", 10 values:   worker 0 holds Fragment("w", start=0, numel=6)
                                worker 1 holds Fragment("w", start=6, numel=4)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """A contiguous piece of one parameter on this worker, all views flat.

    `parameter` is the model's, which under ZeRO 3 may be empty: its parts are what fragments view.
    `module` views the weights that the model computes with, `master` the fp32 weights that the
    optimizer updates (the same memory in plain fp32). `flat` is the tensor that torch's optimizer
    knows and `offset` where the fragment begins in it.
    """

    name: str
    parameter: torch.Tensor
    start: int
    module: torch.Tensor
    master: torch.Tensor
    flat: torch.Tensor
    offset: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.master.numel()

    def copies(self) -> list[torch.Tensor]:
        """Where the fragment's weights lie: once, or as the model's and as the master's."""
        same = self.module.data_ptr() == self.master.data_ptr()
        return [self.master] if same else [self.module, self.master]

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Views on the optimizer's state of this fragment; scalars (Adam's step) as shape (1,)."""
        views = {}
        for kind, value in optimizer.state.get(self.flat, {}).items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.numel() == self.flat.numel() and value.shape == self.flat.shape:
                views[kind] = value.view(-1).narrow(0, self.offset, self.numel)
            else:
                views[kind] = value.reshape(1)
        return views

    def set_state(self, optimizer: torch.optim.Optimizer, kind: str, value: torch.Tensor) -> None:
        """Put back one kind of state; makes the flat state if the optimizer has not stepped yet."""
        held = optimizer.state[self.flat]
        if kind == "step":
            held[kind] = value.reshape(()).clone()
            return
        if kind not in held:
            held[kind] = torch.zeros_like(self.flat, requires_grad=False)
        held[kind].view(-1).narrow(0, self.offset, self.numel).copy_(value)


def _plain(names: dict[int, str], parameters: Sequence[torch.Tensor]) -> Iterator[Fragment]:
    """Stage 0 in fp32: torch's optimizer works on the model's own parameters."""
    for parameter in parameters:
        view = parameter.data.view(-1)
        yield Fragment(
            name=names[id(parameter)],
            parameter=parameter,
            start=0,
            module=view,
            master=view,
            flat=parameter,
            offset=0,
        )


def _partitioned_groups(
    names: dict[int, str], parameters: Sequence[Any], zero: Any
) -> Iterator[Fragment]:
    """Stages 1 and 2: `_hp_mapping` says which piece of a parameter is in our partition."""
    for parameter in parameters:
        mapping = parameter._hp_mapping
        if mapping is None:  # wholly in another worker's partition
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(
            name=names[id(parameter)],
            parameter=parameter,
            start=low.start,
            module=parameter.data.view(-1).narrow(0, low.start, low.numel),
            master=mapping.hp_fragment.data,
            flat=zero.single_partition_of_fp32_groups[mapping.param_group_index],
            offset=high.start,
        )


def _partitioned_parameters(
    names: dict[int, str], parameters: Sequence[Any], zero: Any, rank: int
) -> Iterator[Fragment]:
    """Stage 3: every parameter is cut in equal parts, the last padded."""
    for parameter in parameters:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * size
        numel = min(size, parameter.ds_numel - start)
        if numel <= 0:
            continue
        flat = zero.fp32_partitioned_groups_flat[group]
        yield Fragment(
            name=names[id(parameter)],
            parameter=parameter,
            start=start,
            module=parameter.ds_tensor.data.view(-1).narrow(0, 0, numel),
            master=flat.data.narrow(0, offset, numel),
            flat=flat,
            offset=offset,
        )


def fragments_of(engine: Any, model: torch.nn.Module, rank: int) -> list[Fragment]:
    """The fragments of `model`'s optimized parameters on this worker."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        held = {id(p) for group in engine.basic_optimizer.param_groups for p in group["params"]}
        return list(_plain(names, [p for p in parameters if id(p) in held]))
    if stage == 3:
        held = set(engine.optimizer.grad_position)
        mine = [p for p in parameters if engine.optimizer.get_param_id(p) in held]
        return list(_partitioned_parameters(names, mine, engine.optimizer, rank))
    mine = [p for p in parameters if hasattr(p, "_hp_mapping")]
    return list(_partitioned_groups(names, mine, engine.optimizer))


@contextmanager
def whole_parameters(parameters: Iterable[torch.Tensor], *, change: bool) -> Iterator[None]:
    """Inside, these parameters are whole on every worker, also under ZeRO 3.

    With `change`, what worker 0 leaves in them is cut up again for everybody.
    """
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if change else None):
        yield


@torch.no_grad()
def adopt_changes(fragments: Sequence[Fragment]) -> None:
    """Carry changes that were made to the model's weights over into the master weights.

    Only values that differ from the rounded master are taken: elsewhere the master keeps the bits
    that the model's precision cannot hold. A change below that precision is therefore not seen (a
    master of 1e-8 is 0 in fp16 already): what must be exactly zero is a matter of `HeldMasks`.
    """
    for piece in fragments:
        if piece.module.data_ptr() == piece.master.data_ptr():
            continue
        now = piece.module.to(piece.master.device)
        changed = now != piece.master.to(now.dtype)
        torch.where(changed, now.to(piece.master.dtype), piece.master, out=piece.master)


class HeldMasks:
    """Weights held at zero: out of the gradients, and out of the weights after every step.

    Every worker masks what it holds, so nothing is gathered; the fp32 masters are masked
    themselves, so zero is exact whatever the model's precision.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        fragments: Sequence[Fragment],
        masks: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        """`masks` by the names of `fragments`, True where a weight is kept; gradients are made on
        `device`."""
        self._parameters: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        pruned: dict[str, torch.Tensor] = {}
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            pruned[name] = ~mask.to(device)
            self._parameters.append((parameter, pruned[name]))
            # A hook of the tensor runs before gradients are summed, cut up and measured.
            parameter.register_hook(functools.partial(_without, pruned[name]))
        for piece in fragments:
            if piece.name in pruned:
                part = pruned[piece.name].view(-1).narrow(0, piece.start, piece.numel)
                self._pieces += [(each, part.to(each.device)) for each in piece.copies()]

    @torch.no_grad()
    def apply(self) -> None:
        """W <- W o mask, in the model's weights and in their masters."""
        for values, pruned in self._pieces:
            values.masked_fill_(pruned, 0.0)
        for parameter, pruned in self._parameters:
            if parameter.shape == pruned.shape:  # whole here: always, but for ZeRO 3's larger ones
                parameter.masked_fill_(pruned, 0.0)


def _without(pruned: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(pruned, 0.0)


def loss_scale_state(engine: Any) -> dict[str, float]:
    """The moving parts of fp16's dynamic loss scale, `{}` in other precisions."""
    if not engine.fp16_enabled():
        return {}
    scaler = engine.optimizer.loss_scaler
    return {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS}


def set_loss_scale_state(engine: Any, state: dict[str, float]) -> None:
    """Restore what `loss_scale_state` returned."""
    for name, value in state.items():
        if name not in _SCALER_FIELDS:
            raise ValueError(f"'{name}' is not part of a loss scale's state")
        setattr(engine.optimizer.loss_scaler, name, value if name == "cur_scale" else int(value))


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

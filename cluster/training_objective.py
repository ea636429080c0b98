"""An objective as DeepSpeed takes it: one module whose forward pass gives the losses, and groups of
parameters that are sure to be the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from goldcrest.cluster.errors import StepError

if TYPE_CHECKING:
    from goldcrest.cluster.api import Objective


class ObjectiveModule(torch.nn.Module):
    """Model and objective as one module, so that every forward pass is the engine's forward."""

    def __init__(self, model: torch.nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = (objective,)  # in a tuple: an objective may be a module, not a part of us
        self.loss_names: list[str] = []

    def forward(
        self, batch: dict[str, torch.Tensor], epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, and each loss detached, shape (number of losses,)."""
        losses = self._objective[0].losses(self.model, batch, epoch=epoch)
        for name, value in losses.items():
            if value.ndim != 0:
                raise StepError(f"loss '{name}' has shape {tuple(value.shape)}; losses are scalars")
        names = list(losses)
        if self.loss_names and names != self.loss_names:
            raise StepError(f"the losses changed from {self.loss_names} to {names}")
        self.loss_names = names
        values = torch.stack([value.float() for value in losses.values()])
        return values.sum(), values.detach()


def objective_groups(objective: Objective, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The objective's optimizer groups, checked: trainable parameters of the model only."""
    groups = [dict(group) for group in objective.parameter_groups(model)]
    known = {id(parameter) for parameter in model.parameters()}
    grouped = set()
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        grouped |= {id(parameter) for parameter in group["params"]}
    if not grouped <= known:
        raise StepError(
            "parameter_groups() returned a parameter that is not in the model",
            hint="make it a part of what build_model() returns",
        )
    if not grouped:
        raise StepError("parameter_groups() returned no trainable parameter")
    # An engine would hold state for a trainable parameter that no optimizer moves.
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in grouped)
    return [group for group in groups if group["params"]]


def checked_masks(objective: Objective, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The objective's masks, checked; under the names by which the parameters are saved."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for name, mask in objective.masks(model).items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise StepError(
                f"masks() names '{name}', which is no parameter of the model",
                hint="name parameters as model.named_parameters() does",
            ) from None
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise StepError(
                f"the mask of '{name}' is {mask.dtype} of shape {tuple(mask.shape)}",
                hint=f"masks are boolean, this one of shape {tuple(parameter.shape)}",
            )
        if parameter.requires_grad:  # what is not trained stays as it is
            found[known[id(parameter)]] = mask
    return found


def aliases(model: torch.nn.Module) -> dict[str, str]:
    """Second names of shared parameters -> the name under which they are saved."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def moved(batch: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict:
    """The batch on the device, its floating tensors in the compute precision."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }

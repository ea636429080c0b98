"""Losses over two worker processes equal the loss of one process on both batches together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from goldcrest.kernels.clustering.network import Mlp
from goldcrest.kernels.clustering.terms import vicreg
from goldcrest.kernels.clustering.terms.imsat import information_loss, two_pass_backward
from goldcrest.kernels.clustering.terms.infonce import infonce_loss
from goldcrest.kernels.clustering.terms.mixup import mixup_loss
from goldcrest.kernels.clustering.terms.supcon import supcon_loss

WORKERS, ROWS = 2, 12


def _model() -> Mlp:
    torch.manual_seed(0)
    model = Mlp(5, (8, 8), 4).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    return model


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(WORKERS * ROWS, 5, dtype=torch.float64)
    return x, x + 0.1 * torch.randn_like(x)


def _mixup(model: Mlp, x: Tensor, other: Tensor) -> Tensor:
    # Partners stay inside a worker's batch; neighbours are partners in any cut.
    partner = torch.arange(len(x)) ^ 1
    return mixup_loss(model, x, model(x), partner, torch.full((len(x),), 0.3).double())


LOSSES: dict[str, Callable[[Mlp, Tensor, Tensor], Tensor]] = {
    "information": lambda model, x, other: information_loss(model(x), weight=0.5, mu=3.5),
    "supcon": lambda model, x, other: supcon_loss(model(x), temperature=0.5),
    "supcon_all": lambda model, x, other: supcon_loss(model(x), anchor_mean="all"),
    "infonce": lambda model, x, other: infonce_loss(model(x), model(other)),
    "infonce_kl": lambda model, x, other: infonce_loss(model(x), model(other), distance="kl"),
    "vicreg": lambda model, x, other: vicreg.vicreg_loss(model(x), 0.1 * model(other)),
    "mixup": _mixup,
}


def _loss_and_gradients(model: Mlp, name: str, x: Tensor, other: Tensor) -> list[Tensor]:
    """The loss and the gradients, as means over the workers if any, as an engine has them."""
    model.zero_grad()
    if name == "two_pass":
        model.eval()  # the second pass must see the first one's predictions
        loss = two_pass_backward(model, x.split(5), weight=0.5, mu=3.5)
        model.train()
    else:
        loss = LOSSES[name](model, x, other)
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    found = [loss.detach().clone(), *gradients]
    if dist.is_initialized():
        for value in found:
            dist.all_reduce(value)
            value /= WORKERS
    return found


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS
    )
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    x, other = (value[mine] for value in _data())
    found = {name: _loss_and_gradients(_model(), name, x, other) for name in (*LOSSES, "two_pass")}
    model = _model()
    model(x)
    found["running"] = [value.clone() for value in model.buffers()]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """Losses and gradients of all terms over two processes."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_worker, args=(str(folder),), nprocs=WORKERS)
    return torch.load(Path(folder) / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", [*LOSSES, "two_pass"])
def test_two_workers_equal_one_process(two_workers, name: str) -> None:
    alone = _loss_and_gradients(_model(), name, *_data())
    for ours, theirs in zip(two_workers[name], alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_running_statistics_of_two_workers_equal_one_process(two_workers) -> None:
    model = _model()
    model(_data()[0])
    for ours, theirs in zip(two_workers["running"], model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

"""Learning-rate schedules, against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from goldcrest.cluster.schedules import ONECYCLE_START_DIVISOR, learning_rate
from goldcrest.cluster.training_config import TrainingConfig

STEPS_PER_EPOCH = 7
EPOCHS = 5
TOTAL = STEPS_PER_EPOCH * EPOCHS


def rates(**settings: object) -> list[float]:
    config = TrainingConfig(epochs=EPOCHS, learning_rate=0.4, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, STEPS_PER_EPOCH) for step in range(TOTAL)]


def torch_rates(make: object, base: float = 0.4) -> list[float]:
    """The rates that a torch scheduler gives at each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base, momentum=0.9)
    scheduler = make(optimizer)  # type: ignore[operator]
    out = []
    for _ in range(TOTAL):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_cosine_is_torchs_cosine_annealing() -> None:
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.01)
    )
    assert rates(schedule="cosine", final_learning_rate=0.01) == pytest.approx(expected)


def test_linear_is_torchs_linear() -> None:
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.LinearLR(
            o, start_factor=1.0, end_factor=0.25, total_iters=TOTAL
        )
    )
    assert rates(schedule="linear", final_learning_rate=0.1) == pytest.approx(expected)


def test_exponential_falls_once_per_epoch_like_torchs_step_schedule() -> None:
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=STEPS_PER_EPOCH, gamma=0.97)
    )
    assert rates(schedule="exponential", decay=0.97) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 10])
def test_onecycle_is_torchs_onecycle(warmup: int) -> None:
    share = warmup / TOTAL if warmup else 0.3
    start = 0.4 / ONECYCLE_START_DIVISOR
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o,
            max_lr=0.4,
            total_steps=TOTAL,
            pct_start=share,
            div_factor=ONECYCLE_START_DIVISOR,
            final_div_factor=start / 0.002,
            cycle_momentum=False,
        )
    )
    ours = rates(schedule="onecycle", warmup_steps=warmup, final_learning_rate=0.002)
    assert ours == pytest.approx(expected)


def test_warm_up_rises_linearly_to_the_peak_and_then_the_schedule_begins() -> None:
    ours = rates(schedule="cosine", warmup_steps=4)
    assert ours[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert ours[4] == pytest.approx(0.4)
    assert 0 < ours[-1] < 0.01


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")) == {0.4}

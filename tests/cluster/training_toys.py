"""Small objectives for the tests of the training engine, loaded by path and sent by value."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional


class Toy:
    """A classifier of points on a curve: 48 examples of 8 values, 3 classes; one named loss."""

    examples = 48

    def build_model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 3)
        )

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": decayed}, {"params": rest, "lr_scale": 0.5, "weight_decay": 0.0}]

    def __len__(self) -> int:
        return self.examples

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        number = torch.from_numpy(indices)
        clean = torch.sin(number[:, None] * torch.arange(1, 9)).float()
        noise = torch.from_numpy(rng.normal(0.0, 0.01, clean.shape)).float()
        return {"x": clean + noise, "y": number % 3, "seconds": torch.full((len(indices),), 2.0)}

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        return {"ce": functional.cross_entropy(model(batch["x"]).float(), batch["y"])}

    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {}

    def after_step(self, model: torch.nn.Module, whole: Any) -> None:
        return None

    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        drawn = self.batch(np.arange(self.examples), np.random.default_rng(0))
        right = (model(drawn["x"]).argmax(1) == drawn["y"]).float().mean()
        return {"accuracy": float(right)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert not state


class NoNoise(Toy):
    """No dropout and no noise: the same mathematics for any number of workers."""

    def build_model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3, bias=False)
        )

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        number = torch.from_numpy(indices)
        return {"x": torch.sin(number[:, None] * torch.arange(1, 9)).float(), "y": number % 3}


class Uneven(NoNoise):
    """Examples of 1 to 5 rows each; the loss is a mean over rows, as over tokens of sentences."""

    def sizes(self) -> np.ndarray:
        return 1 + np.arange(self.examples) % 5

    def weights(self) -> np.ndarray:
        return self.sizes()

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = [100 * index + row for index in indices for row in range(1 + index % 5)]
        return super().batch(np.array(rows), rng)

    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        return {}


class Stopping(Toy):
    """Raises at one (epoch, call) like a kill that Python survives."""

    def __init__(self, epoch: int, call: int) -> None:
        self.epoch, self.call, self.calls = epoch, call, 0

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        if epoch == self.epoch:
            self.calls += 1
            if self.calls == self.call:
                raise KeyboardInterrupt
        return super().losses(model, batch, epoch=epoch)


class Wrong(NoNoise):
    """Has an error of its own in epoch 2, on every try; counts the tries in a file."""

    def __init__(self, tries: Path | None) -> None:
        self.tries = tries

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        if self.tries is not None and epoch == 2:
            with self.tries.open("a", encoding="utf-8") as stream:
                stream.write(f"{os.getpid()}\n")
            raise ValueError("the labels are not what they should be")
        return super().losses(model, batch, epoch=epoch)


class Killed(NoNoise):
    """Kills its own worker process once, at its first step of epoch 2."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        if epoch == 2:
            try:
                self.flag.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch, epoch=epoch)


class Held(NoNoise):
    """Every other column of both weights is held at zero, from a dense start."""

    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        first, last = torch.ones(16, 8, dtype=torch.bool), torch.ones(3, 16, dtype=torch.bool)
        first[:, ::2], last[:, ::2] = False, False
        return {"0.weight": first, "2.weight": last}


class Sparse(NoNoise):
    """Holds a mask on the first weight and moves an EMA teacher in the model."""

    def build_model(self) -> torch.nn.Module:
        student = super().build_model()
        teacher = super().build_model().requires_grad_(False)
        model = torch.nn.ModuleDict({"student": student, "teacher": teacher})
        with torch.no_grad():
            student[0].weight[:, ::2] = 0.0  # type: ignore[index]
        teacher.load_state_dict(student.state_dict())
        return model

    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        mask = torch.ones(16, 8, dtype=torch.bool)
        mask[:, ::2] = False
        return {"student.0.weight": mask}

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model["student"].parameters())}]  # type: ignore[index]

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        logits = model["student"](batch["x"])  # type: ignore[index]
        with torch.no_grad():
            taught = model["teacher"](batch["x"])  # type: ignore[index]
        return {
            "ce": functional.cross_entropy(logits.float(), batch["y"]),
            "kd": functional.mse_loss(logits.float(), taught.float()),
        }

    def after_step(self, model: torch.nn.Module, whole: Any) -> None:
        student, teacher = model["student"], model["teacher"]  # type: ignore[index]
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            with whole(old, new):
                old.lerp_(new, 0.1)

    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        return {}


class Adversarial(NoNoise):
    """Virtual adversarial training (a gradient inside the loss) over a model with BatchNorm."""

    def build_model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 3),
        )

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        x = batch["x"]
        logits = model(x)
        clean = functional.log_softmax(logits.float(), 1)
        direction = torch.randn_like(x).requires_grad_()
        shifted = functional.log_softmax(model(x + 0.1 * direction).float(), 1)
        divergence = functional.kl_div(
            shifted, clean.detach(), reduction="batchmean", log_target=True
        )
        (gradient,) = torch.autograd.grad(divergence, direction)
        worst = functional.normalize(gradient, dim=1)
        shifted = functional.log_softmax(model(x + worst).float(), 1)
        return {
            "ce": functional.nll_loss(clean, batch["y"]),
            "vat": functional.kl_div(
                shifted, clean.detach(), reduction="batchmean", log_target=True
            ),
            "entropy": -clean.exp().mean(0).clamp_min(1e-6).log().mean(),  # of the batch's mean
        }


class Remembering(NoNoise):
    """Has state of its own: how many steps it has seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(1)

    def after_step(self, model: torch.nn.Module, whole: Any) -> None:
        self.seen = self.seen + 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["seen"]


class Exploding(Toy):
    """A loss that is NaN in epoch 1 at the third step."""

    def __init__(self) -> None:
        self.calls = 0

    def losses(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, epoch: int
    ) -> dict[str, torch.Tensor]:
        self.calls += epoch == 1
        loss = super().losses(model, batch, epoch=epoch)["ce"]
        return {"ce": loss * float("nan") if epoch == 1 and self.calls == 3 else loss}

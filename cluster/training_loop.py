"""The training loop: one for every system, the same in this process and under Ray Train.

    build model (seeded) -> newest valid checkpoint, if any -> DeepSpeed engine
    each epoch:  permutation of (seed, epoch) -> batches -> chunks, one per worker and micro-batch
        each step:  rate of the schedule; forward and backward per chunk; one exchange of losses;
                    optimizer step; masks held; objective.after_step
        then:       buffers averaged over workers; objective.evaluate; a row of history; checkpoint

Exactness. World size 1 on a CPU in fp32: a run that was killed anywhere and resumed gives the same
bytes as one that was not. More workers: the same up to the order of floating-point sums. A resumed
run may have another number of workers or another ZeRO stage; the batches and, as long as workers x
micro-batches stays the same, the randomness of each chunk do not change. Statistics that a model
takes over a batch (BatchNorm) are over one chunk, as always in data-parallel training.

`objective.after_step`, `evaluate`, `state_dict` run on every worker and must do the same on each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from goldcrest.cluster import checkpoints
from goldcrest.cluster.errors import InputError, StepError
from goldcrest.cluster.schedules import learning_rate
from goldcrest.cluster.training_config import TrainingConfig
from goldcrest.cluster.training_deepspeed import (
    DTYPES,
    build_optimizer,
    check_settings,
    foreign_warnings_silenced,
    start_engine,
)
from goldcrest.cluster.training_meter import Meter, peak_memory_bytes, units_in
from goldcrest.cluster.training_objective import (
    ObjectiveModule,
    aliases,
    checked_masks,
    moved,
    objective_groups,
)
from goldcrest.cluster.training_sampling import (
    Sampler,
    accumulation_steps,
    seed_chunk,
    seed_evaluation,
    seed_model,
)
from goldcrest.cluster.training_shards import (
    Fragment,
    HeldMasks,
    adopt_changes,
    fragments_of,
    loss_scale_state,
    set_loss_scale_state,
    whole_parameters,
)

if TYPE_CHECKING:
    from goldcrest.cluster.api import Objective

# Settings that may differ between the run that wrote a checkpoint and the one that continues it.
_FREE_SETTINGS = {
    "micro_batch_size",
    "micro_batch_units",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "max_failures",
    "max_preemptions",
    "checkpoint_every",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which worker this is, of how many, and the device it computes on."""

    rank: int
    world: int
    device: torch.device


class Reporter(Protocol):
    """Who hears of progress; only worker 0 speaks."""

    def progress(self, done: float, note: str) -> None:
        """Share done in [0, 1] and a short note; called after every step."""
        ...

    def epochs(self, rows: list[dict[str, float]]) -> None:
        """The whole history so far, after every epoch and once after a resumption."""
        ...


@contextlib.contextmanager
def _frozen_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer's step does nothing: DeepSpeed's bookkeeping runs, no weight moves."""
    optimizer.step = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del optimizer.step


class Trainer:
    """One worker's training: state, steps, checkpoints. `run` does it all."""

    def __init__(
        self,
        objective: Objective,
        config: TrainingConfig,
        *,
        place: Place,
        scratch: Path,
        seed: int,
        reporter: Reporter,
    ) -> None:
        check_settings(config)
        self.objective, self.config, self.place = objective, config, place
        self.scratch, self.seed, self.reporter = scratch, seed, reporter
        self.sampler = Sampler(config, objective, seed=seed)
        self.examples, self.steps_per_epoch = self.sampler.examples, self.sampler.steps_per_epoch
        self.dtype = DTYPES[config.precision]
        seed_model(seed)
        self.model = objective.build_model()
        self.groups = objective_groups(objective, self.model)
        self.masks = checked_masks(objective, self.model)
        self.aliases = aliases(self.model)
        self.shapes = {
            n: list(p.shape) for n, p in self.model.named_parameters() if p.requires_grad
        }
        found = self._newest_checkpoint()
        if found is not None:
            self._load_weights(found)
        self._start_engine()
        self.epoch, self.step, self.history = 0, 0, list[dict[str, float]]()
        totals: dict[str, float] = {}
        if found is not None:
            totals = self._load_state(found)
        del found  # closes its files
        self.meter = Meter(totals)

    # -- start ------------------------------------------------------------------------------------

    def _start_engine(self) -> None:
        config, world = self.config, self.place.world
        micro = config.micro_batch_size or math.ceil(config.batch_size / world)
        self.module = ObjectiveModule(self.model, self.objective).to(self.place.device)
        self.optimizer = build_optimizer(self.groups, config)
        self.engine = start_engine(
            self.module,
            self.optimizer,
            config,
            micro_batch=micro,
            accumulation=accumulation_steps(config, world),
        )
        self.fragments = fragments_of(self.engine, self.model, self.place.rank)
        self.held = HeldMasks(self.model, self.fragments, self.masks, self.place.device)

    def _newest_checkpoint(self) -> checkpoints.Checkpoint | None:
        """The newest valid checkpoint; worker 0 verifies and chooses for all."""
        epoch = torch.zeros(1, dtype=torch.int64, device=self.place.device)
        found = None
        if self.place.rank == 0:
            found = checkpoints.latest(self.scratch)
            epoch += found.position.epoch if found is not None else 0
        if self.place.world > 1:
            dist.broadcast(epoch, src=0)
        if found is None and int(epoch):
            found = checkpoints.Checkpoint(checkpoints.folder_after(self.scratch, int(epoch)))
        if found is not None:
            self._check_continues(found)
        return found

    def _check_continues(self, found: checkpoints.Checkpoint) -> None:
        """Refuse in words a checkpoint of another training."""
        written, now = dict(found.position.config), self.config.model_dump(mode="json")
        differing = [
            f"{name} was {written.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in _FREE_SETTINGS and written.get(name) != now[name]
        ]
        facts = {"seed": self.seed, "examples": self.examples, "shapes": self.shapes}
        differing += [
            f"{name} differ" if name == "shapes" else f"{name} was {held} and is {value}"
            for name, value in facts.items()
            if (held := getattr(found.position, name)) != value
        ]
        if differing:
            raise InputError(
                f"checkpoint {found.folder} belongs to another training: {'; '.join(differing)}",
                hint=f"remove {checkpoints.folder_of(self.scratch)} to train from the beginning",
            )

    def _load_weights(self, found: checkpoints.Checkpoint) -> None:
        """Whole weights and buffers into the freshly built model."""
        self.model.load_state_dict(found.model_state())
        self.objective.load_state_dict(found.extra())

    @torch.no_grad()
    def _load_state(self, found: checkpoints.Checkpoint) -> dict[str, float]:
        """Master weights, optimizer state and position into the engine; returns the totals."""
        position = found.position
        for piece in self.fragments:
            master = found.piece(checkpoints.WEIGHT, piece.name, piece.start, piece.numel)
            if master is not None:
                piece.master.copy_(master)
            for kind in found.kinds():
                value = (
                    found.scalar(kind, piece.name)
                    if kind == "step"
                    else found.piece(kind, piece.name, piece.start, piece.numel)
                )
                if value is not None:
                    piece.set_state(self.optimizer, kind, value)
        set_loss_scale_state(self.engine, position.loss_scale)
        self.epoch, self.step = position.epoch, position.step
        self.history = [dict(row) for row in position.history]
        return position.totals

    # -- training ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch; the last checkpoint holds the result."""
        epochs, every = self.config.epochs, self.config.checkpoint_every
        self._tell_history()
        try:
            with foreign_warnings_silenced():
                while self.epoch < epochs:
                    self._train_epoch()
                    self.epoch += 1
                    if self.epoch % every == 0 or self.epoch == epochs:
                        self._save()
                    self._tell_history()
        finally:
            self.engine.destroy()

    def _tell_history(self) -> None:
        if self.place.rank == 0:
            self.reporter.epochs(self.history)

    def _train_epoch(self) -> None:
        """All steps of one epoch, then its row of history."""
        self.engine.train()
        batches = self.sampler.batches(self.epoch)
        sums: list[float] = []
        taken, rate = 0, 0.0
        for number, batch in enumerate(batches):
            rate = learning_rate(self.config, self.step, self.steps_per_epoch)
            losses = self._train_step(batch, number, rate)
            if losses is not None:
                taken += 1
                sums = [a + b for a, b in zip(sums or [0.0] * len(losses), losses, strict=True)]
            self.step += 1
            self._tell_progress(number + 1, losses)
        if not taken:
            raise StepError(f"epoch {self.epoch}: the loss was not finite in any step")
        row: dict[str, float] = {"epoch": self.epoch, "loss": sum(sums) / taken}
        row |= {"learning_rate": rate, "skipped_steps": len(batches) - taken}
        named = {n: s / taken for n, s in zip(self.module.loss_names, sums, strict=True)}
        if clash := sorted(set(row) & set(named) - ({"loss"} if len(named) == 1 else set())):
            raise StepError(f"losses() returned {clash}, which are names of the engine's own")
        self.history.append(self._with_metrics(row | named))

    def _train_step(self, batch: Any, number: int, rate: float) -> list[float] | None:
        """One optimizer step; the mean of each loss over the step, None if it was skipped."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        chunks = self.sampler.chunks(batch, rank=self.place.rank, world=self.place.world)
        values: list[torch.Tensor] = []
        units = [0.0, 0.0]
        for place, chunk in enumerate(chunks):
            rng = seed_chunk(self.seed, self.epoch, number, chunk.number)
            drawn = self.objective.batch(chunk.indices, rng)
            if chunk.weight:
                units = [a + b for a, b in zip(units, units_in(drawn), strict=True)]
            inputs = moved(drawn, self.place.device, self.dtype)
            self.engine.set_gradient_accumulation_boundary(place == len(chunks) - 1)
            total, each = self.engine(inputs, self.epoch)
            # A new tensor even at weight 1: on the forward's own output DeepSpeed 0.19 divides the
            # gradient by the accumulation steps although told not to.
            self.engine.backward(total * chunk.weight, scale_wrt_gas=False)
            values.append(each * chunk.weight if chunk.weight else torch.zeros_like(each))
        losses, units = self._exchange(torch.stack(values).sum(0), units)
        self.meter.count(examples=len(batch), units=units)
        if all(math.isfinite(value) for value in losses):
            self.engine.step()
            self.held.apply()
            with torch.no_grad():
                self.objective.after_step(self.model, self._whole)
            return losses
        if self.config.on_nan == "fail":
            shown = ", ".join(
                f"{n}={v}" for n, v in zip(self.module.loss_names, losses, strict=True)
            )
            raise StepError(
                f"the loss is not finite in epoch {self.epoch}, step {number} "
                f"of {self.steps_per_epoch}: {shown}",
                hint="lower learning_rate, set clip_norm, or set on_nan to skip",
            )
        with _frozen_weights(self.optimizer):
            self.engine.step()
        return None

    def _exchange(
        self, losses: torch.Tensor, units: list[float]
    ) -> tuple[list[float], list[float]]:
        """Losses averaged and units summed over workers: the one exchange of a step that is ours.

        It is also the agreement on whether a loss is finite: a NaN of one worker reaches all.
        """
        if self.place.world == 1:
            return losses.tolist(), units
        packed = torch.cat([losses.double(), losses.new_tensor(units, dtype=torch.float64)])
        dist.all_reduce(packed)
        numbers = packed.tolist()
        count = len(losses)
        return [value / self.place.world for value in numbers[:count]], numbers[count:]

    @contextlib.contextmanager
    def _whole(self, *parameters: torch.nn.Parameter) -> Iterator[None]:
        """What `after_step` opens: these parameters whole, and what it leaves in them kept."""
        with whole_parameters(parameters, change=True):
            yield
        asked = {id(parameter) for parameter in parameters}
        adopt_changes([piece for piece in self.fragments if id(piece.parameter) in asked])

    def _with_metrics(self, row: dict[str, float]) -> dict[str, float]:
        """`row` with the objective's metrics, evaluated on every worker from equal buffers."""
        self._average_buffers()
        self.engine.eval()
        seed_evaluation(self.seed, self.epoch)
        cast = torch.autocast(
            self.place.device.type, self.dtype, enabled=self.dtype is not torch.float32
        )
        with torch.no_grad(), cast:
            metrics = self.objective.evaluate(self.model, epoch=self.epoch)
        if clash := sorted(set(row) & set(metrics)):
            raise StepError(f"evaluate() returned {clash}, which are names of losses or of ours")
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            raise StepError(f"epoch {self.epoch}: evaluate() returned {bad}; metrics are finite")
        return row | {name: float(value) for name, value in metrics.items()}

    def _average_buffers(self) -> None:
        """BatchNorm's running statistics differ between workers: take their mean."""
        if self.place.world == 1:
            return
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.place.world
            else:
                dist.broadcast(buffer, src=0)

    def _tell_progress(self, step: int, losses: list[float] | None) -> None:
        if self.place.rank == 0:
            done = self.step / (self.config.epochs * self.steps_per_epoch)
            shown = "skipped" if losses is None else f"loss {sum(losses):.4g}"
            note = f"epoch {self.epoch + 1}/{self.config.epochs} step {step}/{self.steps_per_epoch}"
            self.reporter.progress(done, f"{note} {shown}")

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        """Every worker writes its fragments; worker 0 the rest, and the commit."""
        first = self.place.rank == 0
        if first:
            checkpoints.begin(self.scratch, self.epoch)
        self._barrier()
        folder = checkpoints.hidden_folder(self.scratch, self.epoch)
        checkpoints.write_tensors(folder, f"shard-{self.place.rank:05d}", self._shard())
        whole = self._whole_tensors()
        peak = self._largest(peak_memory_bytes())
        if first:
            checkpoints.write_tensors(folder, "whole", whole)
            checkpoints.write_tensors(folder, "extra", self.objective.state_dict())
        self._barrier()
        if first:
            checkpoints.commit(self.scratch, self._position(self.meter.settle(peak)))

    def _position(self, totals: dict[str, float]) -> checkpoints.Position:
        return checkpoints.Position(
            epoch=self.epoch,
            step=self.step,
            seed=self.seed,
            examples=self.examples,
            config=self.config.model_dump(mode="json"),
            shapes=self.shapes,
            aliases=self.aliases,
            history=self.history,
            totals=totals,
            workers=self.place.world,
            loss_scale=loss_scale_state(self.engine),
        )

    def _shard(self) -> dict[str, torch.Tensor]:
        """This worker's pieces of weights and optimizer state, by key."""
        pieces: list[Fragment] = self.fragments
        if self.engine.zero_optimization_stage() == 0:  # every worker holds all: share the writing
            pieces = pieces[self.place.rank :: self.place.world]
        tensors = {}
        for piece in pieces:
            tensors[f"{checkpoints.WEIGHT}:{piece.start}:{piece.name}"] = piece.master
            for kind, value in piece.state(self.optimizer).items():
                tensors[f"{kind}:{piece.start}:{piece.name}"] = value
        return tensors

    def _whole_tensors(self) -> dict[str, torch.Tensor]:
        """Buffers and frozen parameters; under ZeRO 3 gathered, so every worker takes part."""
        kept = set(self.model.state_dict())
        whole = {name: b for name, b in self.model.named_buffers() if name in kept}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                with whole_parameters([parameter], change=False):
                    value = parameter.detach()
                    whole[name] = (value.float() if value.is_floating_point() else value).cpu()
        return whole

    def _barrier(self) -> None:
        if self.place.world > 1:
            dist.barrier()

    def _largest(self, value: float) -> float:
        """The largest of the workers' values."""
        if self.place.world == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.place.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)

"""The training engine: one for every system, DeepSpeed inside, in this process or on a cluster.

    train_local   this process, one worker; the same loop and a real DeepSpeed engine
    train_on_ray  Ray Train's TorchTrainer, `config.workers` workers, gloo on CPU and NCCL on GPU

Both continue from what they find in `scratch` and return at once if the training there is finished.
The loop is in `training_loop.py`, checkpoints in `checkpoints.py`, DeepSpeed's switches and memory
layouts in `training_deepspeed.py` and `training_shards.py`, Ray Train in `training_ray.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from goldcrest.cluster.api import Resources, Trained
from goldcrest.cluster.errors import StepError
from goldcrest.cluster.training_config import TrainingConfig

if TYPE_CHECKING:
    from goldcrest.cluster.api import Objective

OnLog = Callable[[Mapping[str, float]], None]
OnProgress = Callable[[float | None, str], None]
_SECONDS_BETWEEN_NOTES = 0.2


class CallbackReporter:
    """Passes progress on to the caller: notes now and then, each row of history once, in order."""

    def __init__(self, on_log: OnLog | None, on_progress: OnProgress | None) -> None:
        self._on_log, self._on_progress = on_log, on_progress
        self._told = 0
        self._last = 0.0

    def progress(self, done: float, note: str) -> None:
        """Tell the share done and a note, at most five times a second."""
        now = time.monotonic()
        if self._on_progress is not None and now - self._last >= _SECONDS_BETWEEN_NOTES:
            self._last = now
            self._on_progress(done, note)

    def epochs(self, rows: list[dict[str, float]]) -> None:
        """Tell the rows that were not told yet (a resumed run tells the earlier ones too)."""
        if self._on_log is not None:
            for row in rows[self._told :]:
                self._on_log(row)
        self._told = max(self._told, len(rows))


def finished(config: TrainingConfig, scratch: Path, reporter: CallbackReporter) -> Trained | None:
    """The result of a training that is complete in `scratch`, else None."""
    from goldcrest.cluster import checkpoints
    from goldcrest.cluster.training_meter import measurements

    found = checkpoints.latest(scratch)
    if found is None or found.position.epoch < config.epochs:
        return None
    position = found.position
    reporter.epochs(position.history)
    return Trained(
        model_state=found.model_state(),
        extra_state=found.extra(),
        history=[dict(row) for row in position.history],
        measurements=measurements(position.totals, config, position.workers),
    )


def result(config: TrainingConfig, scratch: Path, reporter: CallbackReporter) -> Trained:
    """The result of a training that has just ended."""
    trained = finished(config, scratch, reporter)
    if trained is None:
        raise StepError(
            f"training ended but {scratch} holds no valid last checkpoint",
            hint="the disk may be damaged, or not shared between the nodes",
        )
    return trained


@contextmanager
def _threads(count: float) -> Iterator[None]:
    """torch computes with `count` threads inside, as one worker on Ray would."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_local(
    objective: Objective,
    config: TrainingConfig,
    *,
    scratch: Path,
    seed: int,
    on_log: OnLog | None = None,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train in this process with one worker, whatever `config.workers` says.

    `scratch` keeps the checkpoints; `on_log` gets each row of history once, `on_progress` the share
    done and a note. Raises InputError for settings that cannot work and StepError for a training
    that failed. The caller's random state and thread count are left as they were.
    """
    import torch

    from goldcrest.cluster.training_deepspeed import single_process_group
    from goldcrest.cluster.training_loop import Place, Trainer
    from goldcrest.cluster.training_sampling import kept_randomness

    reporter = CallbackReporter(on_log, on_progress)
    gpu = config.gpus_per_worker > 0
    place = Place(rank=0, world=1, device=torch.device("cuda", 0) if gpu else torch.device("cpu"))
    with single_process_group(gpu=gpu), kept_randomness(), _threads(config.cpus_per_worker):
        Trainer(objective, config, place=place, scratch=scratch, seed=seed, reporter=reporter).run()
    return result(config, scratch, reporter)


def train_on_ray(
    objective: Objective,
    config: TrainingConfig,
    *,
    scratch: Path,
    seed: int,
    on_log: OnLog | None = None,
    on_progress: OnProgress | None = None,
    wanted: Resources | None = None,
) -> Trained:
    """Train with Ray Train on `config.workers` workers; same contract as `train_local`.

    `scratch` must be a folder that every node sees under the same path. A lost worker or node
    restarts the group from the last checkpoint, at most `config.max_failures` times; an error in
    the objective is not repeated. `wanted` is what each worker asks of its node beside the
    config's cores and GPUs: memory, accelerator type, custom resources, labels.
    """
    from goldcrest.cluster.training_ray import fit

    reporter = CallbackReporter(on_log, on_progress)
    done = finished(config, scratch, reporter)
    if done is not None:
        return done
    fit(objective, config, wanted or Resources(), scratch=scratch, seed=seed, reporter=reporter)
    return result(config, scratch, reporter)

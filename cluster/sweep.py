"""A sweep: many trials of one pipeline over a space of configs, on Ray Tune, in one store.

    check the space -> points -> Tune starts trials -> each is a run of the pipeline -> best config

Tune decides which trial runs when, how many at once, and which are stopped early
(`sweep_search`); a trial is a whole run (`sweep_trial`) on the same Ray and the same store, so what
trials have in common is computed once, and what a killed sweep had finished is found again. Tune's
own state is scratch: it is never read, and a repeated command goes on from the store and the
sweep's record (`sweep_record`).

A sweep tells of itself in the words of a run whose steps are its trials. So progress, MLflow (one
parent run with a child per trial) and the event file are those of a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from goldcrest.cluster.config_file import Tree, to_yaml
from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.events import (
    Failure,
    Listener,
    RunFinished,
    RunResult,
    RunStarted,
    interruption,
)
from goldcrest.cluster.masking import is_secret_name, mask_secrets
from goldcrest.cluster.plan import Plan, pipeline_name
from goldcrest.cluster.process_id import ProcessId
from goldcrest.cluster.profile import Profile, check_placement, running_nodes
from goldcrest.cluster.ray_session import attach, leave
from goldcrest.cluster.report import write_text
from goldcrest.cluster.run_record import EventFile, Notifier
from goldcrest.cluster.sweep_plan import SweepOptions, SweepPlan, plan_sweep
from goldcrest.cluster.sweep_record import SweepRecord, SweepResult, TrialResult
from goldcrest.cluster.sweep_space import Space

if TYPE_CHECKING:
    from goldcrest.cluster.store import Store
    from goldcrest.cluster.sweep_monitor import Monitor

MOST_PARALLEL = 4
"""Trials at once where nothing is said: each has a process of its own besides its steps'."""
_LOST = 2  # times that a trial whose process was lost is begun again
_HEAD = "node:__internal_head__"  # a resource that every Ray has once, on its head node
_SHARE = 0.0005  # of it, for one trial: Tune wants every trial to ask for something
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record and MLflow are written by us
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `_interruptible` ends trials in good order
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # rows of curves have no metric yet
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output can be silenced
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a config are relative to the user's folder
}


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was stopped in good order; `result` is what it had come to."""

    def __init__(self, result: SweepResult) -> None:
        super().__init__("the sweep was interrupted")
        self.result = result


def sweep(
    pipeline: Any,
    tree: Tree,
    space: Space,
    options: SweepOptions,
    *,
    store: Store,
    profile: Profile | None = None,
    listeners: Sequence[Listener] = (),
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Search `space` around the config in `tree` (plain values) for the best metric.

    `pipeline` is a module (or class) with `Config` and `build`; `name` names the sweep, by default
    after what is asked, so that the same command goes on where it was; `say` is told what the sweep
    waits for. Raises InputError before anything starts where space, config, options or profile are
    wrong, and SweepInterrupted after Ctrl-C. Trials that fail, and a metric that no trial has, are
    part of the result.
    """
    profile = profile or Profile()
    plan = plan_sweep(pipeline, tree, space, options, profile=profile, name=name)
    record = SweepRecord(store.run_folder(plan.name))
    # The same sweep started twice: one waits, and then finds everything done.
    with store.lease(plan.asked, owner=f"sweep {plan.name}", wait=say):
        record.claim({"asked": plan.asked, "sweep": plan.name, **plan.facts})
        running = _Sweep(
            plan=plan,
            pipeline=pipeline,
            tree=tree,
            space=space,
            options=options,
            store=store,
            profile=profile,
            record=record,
            notify=Notifier([EventFile(record.folder / "events.jsonl"), *listeners]),
        )
        return running.execute()


class _Sweep:
    """One sweep in the driver's process."""

    def __init__(
        self,
        *,
        plan: SweepPlan,
        pipeline: Any,
        tree: Tree,
        space: Space,
        options: SweepOptions,
        store: Store,
        profile: Profile,
        record: SweepRecord,
        notify: Notifier,
    ) -> None:
        self.plan, self.pipeline, self.tree, self.space = plan, pipeline, tree, space
        self.options, self.store, self.profile = options, store, profile
        self.record, self.notify = record, notify
        self.started = time.monotonic()
        self.monitor: Monitor | None = None

    def execute(self) -> SweepResult:
        """Attach to Ray, let Tune run the trials, write down what came of them."""
        mode = attach(self.profile)
        try:
            check_placement(
                self.plan.steps,
                running_nodes(),
                self.profile,
                one_node=not self.store.shared_paths,
            )
            self._tell_start()
            self._tune()
        except GoldcrestError as error:
            self._finish(Failure(step=None, message=error.message, hint=error.hint))
            raise
        except Exception as error:  # a fault of Tune: what was done until then is told all the same
            said = f"the sweep was broken off by a fault, {type(error).__name__}: {error}"
            hint = "what has finished is in the store; the same command goes on from there"
            self._finish(Failure(step=None, message=said, hint=hint))
            raise
        finally:
            leave(mode)
        result = self._finish(self.monitor.fault if self.monitor else None)
        if result.status == "interrupted":
            raise SweepInterrupted(result)
        return result

    def _tell_start(self) -> None:
        self.notify(
            RunStarted(
                run_id=self.plan.name,
                pipeline=pipeline_name(self.pipeline),
                plan=Plan(pipeline=pipeline_name(self.pipeline), steps=()),
                config=mask_secrets(self.plan.facts),
                folder=self.record.folder,
            )
        )

    def _tune(self) -> None:
        """Hand the trials to Tune; every decision of it comes back through the monitor."""
        from ray import tune

        from goldcrest.cluster.sweep_monitor import Ending, Monitor
        from goldcrest.cluster.sweep_search import make_scheduler
        from goldcrest.cluster.sweep_trial import TrialActor

        job = self._job()
        options = self.options
        search = self._search()
        self.monitor = Monitor(job, self.record, self.notify, options.scheduler)
        actor = tune.with_resources(
            tune.with_parameters(TrialActor, job=job),
            tune.PlacementGroupFactory([{_HEAD: _SHARE}]),  # no core: those are for the steps
        )
        with (
            contextlib.closing(self.monitor),
            _scratch(self.record.folder) as scratch,
            _quiet(),
            _interruptible(self.monitor),
        ):
            tune.Tuner(
                actor,
                tune_config=tune.TuneConfig(
                    num_samples=search.count,
                    search_alg=search,
                    scheduler=make_scheduler(
                        options.scheduler, grace=options.grace, reduction=options.reduction
                    ),
                    max_concurrent_trials=self._parallel(),
                    reuse_actors=True,
                    trial_name_creator=_trial_name,
                    trial_dirname_creator=_trial_name,
                ),
                run_config=tune.RunConfig(
                    name=self.plan.name,
                    storage_path=str(scratch),
                    callbacks=[self.monitor],
                    stop=Ending(self.monitor),
                    failure_config=tune.FailureConfig(max_failures=_LOST),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                    # Silent as well, where Tune's choice for a notebook clears what was printed.
                    progress_reporter=tune.CLIReporter(),
                ),
            ).fit()

    def _job(self) -> Any:
        from goldcrest.cluster.sweep_trial import Goal, Job, Watch

        options = self.options
        goal = Goal(metric=options.metric, mode=options.mode)
        named = options.watch.rpartition(".")[2] if options.watch else None
        return Job(
            sweep=self.plan.name,
            pipeline=self.pipeline,
            config_class=self.pipeline.Config,
            tree=self.tree,
            space=self.space,
            folder=Path.cwd(),
            store_uri=self.store.uri,
            profile=self.profile,
            goal=goal,
            watch=Watch(steps=self.plan.watched, name=named, mode=options.watch_mode, goal=goal),
        )

    def _search(self) -> Any:
        from goldcrest.cluster.sweep_search import make_search

        recorded, replays = self.record.earlier(self.space)
        return make_search(self.options, self.space, self.plan.points, recorded, replays)

    def _parallel(self) -> int:
        import ray

        if self.options.parallel is not None:
            return self.options.parallel
        return max(1, min(MOST_PARALLEL, int(ray.cluster_resources().get("CPU", 1))))

    # ------------------------------------------------------------------------------ the end

    def _finish(self, fault: Failure | None) -> SweepResult:
        """The result, in all the places where it belongs."""
        trials = dict(sorted(self.monitor.trials.items())) if self.monitor else {}
        status = self._status(list(trials.values()), fault)
        if status == "interrupted":
            fault = interruption("sweep")
        result = SweepResult(
            sweep=self.plan.name,
            pipeline=pipeline_name(self.pipeline),
            metric=self.options.metric,
            mode=self.options.mode,
            status=status,
            seconds=time.monotonic() - self.started,
            trials=list(trials.values()),
            error=fault or _first_failure(list(trials.values())),
        )
        self._write_best(result)
        self._write_report(result)
        self.record.write("result.json", result.as_json())
        self.notify(RunFinished(run_id=self.plan.name, result=_as_run(result)))
        with contextlib.suppress(OSError, GoldcrestError):  # a sweep does not fail for its record
            self.store.publish_run(self.plan.name)
        return result

    def _status(
        self, trials: list[TrialResult], fault: Failure | None
    ) -> Literal["succeeded", "failed", "interrupted"]:
        if self.monitor is not None and self.monitor.interrupted:
            return "interrupted"
        done = any(trial.metric is not None for trial in trials)
        return "succeeded" if done and fault is None else "failed"

    def _write_best(self, result: SweepResult) -> None:
        """The best trial's config as YAML that `goldcrest run --config` takes."""
        if result.best is None:
            return
        tree, left_out = _without_secrets(self.space.apply(self.tree, result.best.config))
        lines = [
            f"# The best of {len(result.trials)} trials of {result.sweep}:",
            f"# {result.metric} = {result.best.metric:.6g} in trial {result.best.number}.",
            *(f"# Left out, as it is a secret: {field}" for field in left_out),
        ]
        path = self.record.folder / "best.yaml"
        with contextlib.suppress(OSError):
            write_text(path, "\n".join(lines) + "\n" + to_yaml(tree))
            result.best_config = str(path)

    def _write_report(self, result: SweepResult) -> None:
        from goldcrest.cluster.sweep_report import write_report

        try:
            result.report = str(write_report(self.record.folder, result, self.space))
        except Exception as error:  # noqa: BLE001 - a report never fails a sweep
            reason = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"goldcrest: the sweep's report was not written: {reason}\n")


def _trial_name(trial: Any) -> str:
    return f"trial-{int(trial.config['number']):03d}"


def _first_failure(trials: Sequence[TrialResult]) -> Failure | None:
    """What to tell where no trial has succeeded."""
    if any(trial.metric is not None for trial in trials):
        return None
    return next((trial.failure for trial in trials if trial.failure), None)


def _as_run(result: SweepResult) -> RunResult:
    """The sweep's result in the form that listeners of runs know."""
    best = result.best
    return RunResult(
        run=result.sweep,
        pipeline=result.pipeline,
        status=result.status,
        seconds=result.seconds,
        steps=[],
        metrics={
            "best": {result.metric: best.metric} if best else {},
            "executions": result.executions,
        },
        report=result.report,
        error=result.error,
    )


def _without_secrets(tree: Tree) -> tuple[Tree, list[str]]:
    """A config's tree without its secret fields, and their names."""
    left_out: list[str] = []

    def kept(value: Any, place: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        made = {}
        for name, inner in value.items():
            dotted = f"{place}.{name}" if place else str(name)
            if is_secret_name(str(name)) and inner:
                left_out.append(dotted)
            else:
                made[name] = kept(inner, dotted)
        return made

    return kept(tree, ""), left_out


# ------------------------------------------------------------------------ around Tune's loop


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A fresh folder for Tune's own state; what earlier attempts left is swept away."""
    for old in folder.glob("tune-*"):
        shutil.rmtree(old, ignore_errors=True)
    mine = f"tune-{ProcessId.current().mark}-"  # gc can tell whose it is
    made = Path(tempfile.mkdtemp(prefix=mine, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's settings for this sweep only, and its log below errors silenced."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_SETTINGS)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interruptible(monitor: Monitor) -> Iterator[None]:
    """The first Ctrl-C lets the trials end in good order, the second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        monitor.interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

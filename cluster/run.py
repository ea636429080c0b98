"""Run a pipeline: plan it, send what is missing to Ray step by step, tell how it goes.

    plan -> all there? done, without Ray : attach to Ray -> submit every missing step as a Ray task
    that takes its upstream tasks' references, so Ray itself orders and places the work -> watch

A step that fails takes only its dependants with it: they are skipped, siblings finish. A run that
ends early, however, is continued by the same command: everything finished lies in the store.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from goldcrest.cluster.artifact import Artifact, merge_nested
from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.events import (
    Event,
    Failure,
    Listener,
    RunFinished,
    RunResult,
    RunStarted,
    StepChanged,
    StepLog,
    StepProgress,
    StepResult,
    StepState,
    interruption,
)
from goldcrest.cluster.placement import own_resources, task_options
from goldcrest.cluster.plan import Plan, PlannedStep, make_plan
from goldcrest.cluster.profile import (
    Profile,
    beside_its_workers,
    check_placement,
    running_nodes,
)
from goldcrest.cluster.ray_session import attach, leave
from goldcrest.cluster.reservations import release_orphans
from goldcrest.cluster.run_record import (
    EventFile,
    Notifier,
    ProgressReader,
    RunRecord,
    new_run_id,
    plain_config,
)
from goldcrest.cluster.shared_store import prove_shared

if TYPE_CHECKING:
    from goldcrest.cluster.keys import Fingerprints
    from goldcrest.cluster.store import Store
    from goldcrest.cluster.worker import Outcome

_POLL = 0.1  # seconds between two looks at progress files and timeouts
_BETWEEN_RELEASES = 3.0  # seconds between two looks for reserved cores whose owner has died
_CANCEL_GRACE = 5.0  # seconds that cancelled steps get to end


def run(
    pipeline: Any,
    config: Any,
    *,
    store: Store,
    profile: Profile | None = None,
    listeners: Sequence[Listener] = (),
    run_id: str | None = None,
    fingerprints: Fingerprints | None = None,
    stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Run `pipeline.build(config)`; steps whose results are in the store are not run again.

    `pipeline` is a module (or object) with `build`; `run_id` names the run (to continue a record);
    `stop` is asked several times a second: once it says True, the run ends as after Ctrl-C.
    A failed step makes a result with status "failed", not an exception. Raises InputError for a
    wrong pipeline, config, input or profile, before any step starts, and KeyboardInterrupt after
    the run was stopped in good order.
    """
    started = time.monotonic()
    profile = profile or Profile()
    plan = make_plan(pipeline, config, store, profile=profile, fingerprints=fingerprints)
    run_id = run_id or new_run_id(plan.pipeline)
    folder = store.run_folder(run_id)
    values = plain_config(config)
    record = RunRecord.begin(
        folder,
        run_id=run_id,
        plan=plan,
        module=str(getattr(pipeline, "__name__", "")),
        config=values,
        store_uri=store.uri,
        profile=profile.model_dump(mode="json", exclude_defaults=True),
    )
    # From now on other hosts see it: what it needs is kept, it can go on.
    _publish(store, run_id, folder)
    notify = Notifier([EventFile(folder / "events.jsonl"), *listeners])
    driver = _Driver(plan, store=store, run_id=run_id, folder=folder, notify=notify, stop=stop)
    notify(
        RunStarted(run_id=run_id, pipeline=plan.pipeline, plan=plan, config=values, folder=folder)
    )
    status: Literal["interrupted"] | None = None
    try:
        driver.execute(profile)
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except GoldcrestError as error:
        driver.failure = Failure(step=None, message=error.message, hint=error.hint)
        raise
    finally:
        result = driver.result(time.monotonic() - started, status)
        record.finish(result)  # before the listeners: a report may fail, the record may not
        notify(RunFinished(run_id=run_id, result=result))
        record.finish(result)  # again: a listener has filled in where the report is
        _publish(store, run_id, folder)
    return result


def _publish(store: Store, run_id: str, folder: Path) -> None:
    """Copy the record to a remote store; a run does not fail for its record.

    Logs are masked first: a step that was killed, under this driver or an earlier one, could not.
    """
    from goldcrest.cluster.worker import mask_log

    for log in folder.glob("logs/*.log"):
        mask_log(log)
    try:
        store.publish_run(run_id)
    except (OSError, GoldcrestError) as error:
        sys.stderr.write(f"goldcrest: the run's record stays on this machine: {error}\n")


class _Driver:
    """The state of one run in the driver's process."""

    def __init__(
        self,
        plan: Plan,
        *,
        store: Store,
        run_id: str,
        folder: Path,
        notify: Notifier,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.run_id = run_id
        self.folder = folder
        self.notify = notify
        self.stop = stop or (lambda: False)
        self.failure: Failure | None = None  # of the run itself
        self.states: dict[str, StepState] = {}
        self.seconds: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self.failures: dict[str, Failure] = {}
        self.artifacts: dict[str, Artifact] = {}
        self._planned = {planned.step.name: planned for planned in plan.steps}
        self._references: dict[str, Any] = {}  # of the steps that are not settled
        self._running: dict[str, _Running] = {}
        self._progress = ProgressReader(folder)

    def execute(self, profile: Profile) -> None:
        """Bring every step into a final state."""
        for planned in self.plan.steps:
            self.reasons[planned.step.name] = planned.reason
            if planned.artifact is not None:
                self._has(planned, "cached", planned.artifact, seconds=0.0, place="")
            else:
                self._change(planned, "waiting")
        if not self.plan.to_run:
            return
        for planned in self.plan.to_run:
            if planned.step.task.check is not None:
                planned.step.task.check(planned.step.config)
        mode = attach(profile)
        try:
            check_placement(
                [p.step for p in self.plan.to_run],
                running_nodes(),
                profile,
                one_node=not self.store.shared_paths,
            )
            self._check_store()
            self._submit()
            self._watch()
        except KeyboardInterrupt:
            self._cancel()
            raise
        finally:
            leave(mode)

    def _check_store(self) -> None:
        """Every node must see the store; which do not see the run's folder is told."""
        unseen = prove_shared(self.store, self.folder)
        if unseen:
            sys.stderr.write(
                f"goldcrest: {', '.join(unseen)} cannot write to {self.folder}: steps there show "
                "no progress and no log before they end, and their timeouts are not enforced\n"
            )

    def _submit(self) -> None:
        """Send every missing step to Ray, upstream references as arguments."""
        import ray

        from goldcrest.cluster.worker import RunContext, execute_step

        context = ray.put(
            RunContext(
                run_id=self.run_id,
                pipeline=self.plan.pipeline,
                store_uri=self.store.uri,
                folder=self.folder,
            )
        )
        self._forget_earlier_attempts()
        remote = ray.remote(execute_step)
        nodes = running_nodes()
        for planned in self.plan.to_run:
            step = planned.step
            upstream = [self._references[n] for n in step.upstream if n in self._references]
            free = self.store.shared_paths
            wanted = own_resources(step) if free else beside_its_workers(step, nodes)
            options = {
                **task_options(wanted),
                "name": step.name,
                # A sweep's trial lives in a placement group that has no room for its steps.
                "scheduling_strategy": "DEFAULT",
                "max_retries": step.task.retries,
                "retry_exceptions": list(step.task.retry_on) or False,
            }
            self._references[step.name] = remote.options(**options).remote(step, context, *upstream)

    def _forget_earlier_attempts(self) -> None:
        """Under the name of an earlier run, its logs and progress are there still."""
        names = [planned.step.name for planned in self.plan.to_run]
        self._progress.skip_old(names)
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / "logs" / f"{name}.log").unlink(missing_ok=True)

    def _watch(self) -> None:
        """Follow the steps until all are settled."""
        import ray

        released = time.monotonic()
        while self._references:
            if self.stop():
                raise KeyboardInterrupt
            names = list(self._references)
            ready, _ = ray.wait(list(self._references.values()), num_returns=1, timeout=_POLL)
            for name in names:
                self._read_progress(name)
            for name in names:
                if self._references.get(name) in ready:
                    self._settle(name)
            self._stop_late_steps()
            if time.monotonic() - released > _BETWEEN_RELEASES:
                self._release_cores()
                released = time.monotonic()
        self._release_cores()

    def _release_cores(self) -> None:
        """Give back what a dead training had reserved; if Ray is not to be asked, another time."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            release_orphans()

    def _read_progress(self, name: str) -> None:
        planned = self._planned[name]
        for line in self._progress.new(name):
            running = self._running.get(name)
            if line["kind"] == "begin":
                timeout = planned.step.timeout
                self._running[name] = _Running(timeout, str(line["place"]))
                self._change(planned, "running", place=str(line["place"]))
            elif line["kind"] == "progress":
                note = str(line.get("note", ""))
                self.notify(
                    StepProgress(run_id=self.run_id, step=name, share=line.get("share"), note=note)
                )
            elif line["kind"] == "log" and running is not None:
                self.notify(
                    StepLog(run_id=self.run_id, step=name, index=running.rows, row=line["row"])
                )
                running.rows += 1
            elif line["kind"] == "exit" and running is not None:
                running.exit_status = int(line["status"])

    def _settle(self, name: str) -> None:
        """Take the outcome of a step that has ended, after those of its upstream steps."""
        import ray

        planned = self._planned[name]
        for upstream in planned.step.upstream:
            if upstream in self._references:
                ready, _ = ray.wait([self._references[upstream]], timeout=0)
                if ready:
                    self._settle(upstream)
        reference = self._references.pop(name)
        broken = [u for u in planned.step.upstream if self.states[u] in ("failed", "skipped")]
        if broken:
            failed = ", ".join(f"`{upstream}` {self.states[upstream]}" for upstream in broken)
            self.reasons[name] = f"upstream {failed}"
            self._change(planned, "skipped")
            return
        try:
            outcome: Outcome = ray.get(reference)
        except (ray.exceptions.RayError, Exception) as error:  # noqa: BLE001 - a task raises anything
            self._read_progress(name)
            self._fail(planned, error)
            return
        self._read_progress(name)
        artifact = self.store.find(planned.step.key, verify=False)
        if artifact is None:
            lost = GoldcrestError("its result vanished from the store right after it was written")
            self._fail(planned, lost)
            return
        if outcome.state == "cached":
            self.reasons[name] = "made by another run meanwhile"
        state: StepState = "ran" if outcome.state == "ran" else "cached"
        self._has(planned, state, artifact, seconds=outcome.seconds, place=outcome.place)

    def _has(
        self,
        planned: PlannedStep,
        state: StepState,
        artifact: Artifact,
        *,
        seconds: float,
        place: str,
    ) -> None:
        """A step's artifact is there."""
        name = planned.step.name
        self.artifacts[name] = artifact
        self.seconds[name] = seconds
        self._change(
            planned,
            state,
            place=place,
            seconds=float(artifact.manifest.get("seconds", seconds)),
            path=str(artifact.path),
            metrics=artifact.metrics,
            manifest=artifact.manifest,
        )

    def _fail(self, planned: PlannedStep, error: BaseException) -> None:
        from goldcrest.cluster.failures import describe_failure

        name = planned.step.name
        running = self._running.get(name)
        failure = describe_failure(
            name,
            error,
            log=self.folder / "logs" / f"{name}.log",
            exit_status=running.exit_status if running else None,
            timed_out=running.timeout if running and running.stopped else None,
        )
        self.failures[name] = failure
        self.reasons[name] = failure.message
        self.seconds[name] = time.monotonic() - running.since if running else 0.0
        self._change(planned, "failed", failure=failure, seconds=self.seconds[name])

    def _change(self, planned: PlannedStep, state: StepState, **facts: Any) -> None:
        name = planned.step.name
        self.states[name] = state
        event: Event = StepChanged(
            run_id=self.run_id,
            step=name,
            state=state,
            reason=self.reasons[name],
            key=planned.step.key,
            **facts,
        )
        self.notify(event)

    def _stop_late_steps(self) -> None:
        """Stop the steps whose time is up: with force, as native code heeds nothing else."""
        import ray

        for name, running in self._running.items():
            reference = self._references.get(name)
            if reference is not None and running.late and not running.stopped:
                running.stopped = True
                ray.cancel(reference, force=True, recursive=True)

    def _cancel(self) -> None:
        """Stop everything after Ctrl-C; what is finished by then is kept."""
        import ray

        for reference in self._references.values():
            ray.cancel(reference, force=True, recursive=True)
        ray.wait(
            list(self._references.values()),
            num_returns=len(self._references),
            timeout=_CANCEL_GRACE,
        )
        self._release_cores()

    def _in_order(self) -> list[Artifact]:
        """The artifacts in the order of the plan: of two bundles of one name the last counts."""
        names = [planned.step.name for planned in self.plan.steps]
        return [self.artifacts[name] for name in names if name in self.artifacts]

    def result(self, seconds: float, status: Literal["interrupted"] | None) -> RunResult:
        """What the run came to, from the states of its steps and their artifacts."""
        rows = [self._row(planned) for planned in self.plan.steps]
        metrics: dict[str, Any] = {}
        measurements: dict[str, Any] = {}
        bundles: dict[str, str] = {}
        quarantined = 0
        for artifact in self._in_order():
            facts = artifact.metrics
            quarantined += int(facts.pop("quarantined", 0))
            merge_nested(metrics, facts)
            merge_nested(measurements, artifact.manifest.get("measurements", {}))
            if "bundle.json" in artifact:
                bundles[str(artifact.json("bundle")["name"])] = str(artifact.path)
        done = all(row.state in ("ran", "cached") for row in rows)
        failures = [self.failures[row.name] for row in rows if row.name in self.failures]
        error = self.failure or next(iter(failures), None)
        if status == "interrupted":
            error = interruption("run")  # steps that failed before have their reasons in the rows
        return RunResult(
            run=self.run_id,
            pipeline=self.plan.pipeline,
            status=status or ("succeeded" if done and error is None else "failed"),
            seconds=seconds,
            steps=rows,
            metrics=metrics,
            measurements=measurements,
            bundles=bundles,
            quarantined=quarantined,
            error=error,
        )

    def _row(self, planned: PlannedStep) -> StepResult:
        name = planned.step.name
        state = self.states.get(name, "skipped")
        unfinished = state in ("waiting", "running")
        return StepResult(
            name=name,
            key=planned.step.key,
            state="skipped" if unfinished else state,
            seconds=round(self.seconds.get(name, 0.0), 3),
            reason="the run ended before" if unfinished else self.reasons.get(name, ""),
        )


class _Running:
    """A step that a worker has begun."""

    def __init__(self, timeout: float | None, place: str) -> None:
        self.since = time.monotonic()
        self.timeout = timeout
        self.place = place
        self.rows = 0  # of its curves so far
        self.exit_status: int | None = None
        self.stopped = False

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return self.timeout is not None and time.monotonic() - self.since > self.timeout

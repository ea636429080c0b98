"""`goldcrest sweep`: many trials of a pipeline over a space of configs, and the best of them.

    goldcrest sweep speaker --config tiny --space speaker-clustering --trials 12 \\
        --metric clustering.cimc.nmi --mode max

A space is a YAML file over dotted config paths (see cluster/sweep_space.py), or the name of one in
`configs/sweeps/`. The same command goes on where an interrupted one was.
"""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from goldcrest.cluster.masking import mask_secrets, mask_text
from goldcrest.pipelines.cli_common import (
    FAILED,
    AddressOption,
    Answer,
    ConfigOption,
    CorpusOption,
    EvalCorpusOption,
    JsonOption,
    OverrideOption,
    PipelineArgument,
    ProfileOption,
    StoreOption,
    TrackingOption,
    TrackingUriOption,
    answering,
    check_run_name,
    err,
    make_profile,
    open_store,
    print_table,
    say,
    warn,
)

if TYPE_CHECKING:
    from goldcrest.cluster.sweep_record import SweepResult, TrialResult

_SHOWN = 10  # trials in the table at the end, the best first


class Mode(StrEnum):
    """Which values of a metric are good."""

    min = "min"
    max = "max"


class Search(StrEnum):
    """Where points come from."""

    random = "random"
    optuna = "optuna"
    grid = "grid"


class Scheduler(StrEnum):
    """Which trials are given up early."""

    fifo = "fifo"
    asha = "asha"
    pbt = "pbt"


def sweep(
    pipeline: PipelineArgument,
    space: Annotated[
        str, typer.Option(metavar="FILE", help="YAML of the space, or a name in configs/sweeps")
    ],
    metric: Annotated[
        str, typer.Option(metavar="PATH", help="dotted path into the metrics of a run")
    ],
    mode: Annotated[Mode, typer.Option(help="which values of the metric are good")] = Mode.min,
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="how many trials [default: the whole grid]"),
    ] = None,
    config: ConfigOption = None,
    corpus: CorpusOption = None,
    eval_corpus: EvalCorpusOption = None,
    override: OverrideOption = None,
    search: Annotated[Search, typer.Option(help="where points come from")] = Search.random,
    scheduler: Annotated[
        Scheduler,
        typer.Option(
            help="fifo: all run to their end; asha: only the better go on; pbt: the worst quarter "
            "gives way to perturbed copies of the best"
        ),
    ] = Scheduler.fifo,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="trials at once [default: CPU cores, at most 4]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the search")] = 0,
    watch: Annotated[
        str | None,
        typer.Option(
            metavar="[STEP.]NAME",
            help="curve that asha and pbt compare [default: the metric's own, else the loss, of "
            "the first training that the space touches]",
        ),
    ] = None,
    watch_mode: Annotated[Mode, typer.Option(help="which values of that curve are good")] = (
        Mode.min
    ),
    grace: Annotated[
        int,
        typer.Option(min=1, help="epochs before asha may stop a trial, or between looks of pbt"),
    ] = 3,
    reduction: Annotated[float, typer.Option(min=1.01, help="asha: one in this many goes on")] = 3,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="name of this sweep")] = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    address: AddressOption = None,
    tracking_uri: TrackingUriOption = None,
    tracking: TrackingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Search a space of configs; trials share every step that they have in common."""
    frame: dict[str, Any] = {
        "sweep": name,
        "pipeline": pipeline,
        "metric": metric,
        "mode": mode.value,
        "status": "failed",
        "seconds": 0.0,
        "trials": [],
        "best": None,
        "executions": {"ran": 0, "cached": 0},
    }
    with answering(json_file, frame) as answer:
        from goldcrest.cluster.progress import make_progress
        from goldcrest.cluster.sweep import SweepInterrupted
        from goldcrest.cluster.sweep import sweep as run_sweep
        from goldcrest.cluster.sweep_plan import SweepOptions
        from goldcrest.pipelines.cli_run import tracker

        options = SweepOptions(
            metric=metric,
            mode=mode.value,
            trials=trials,
            search=search.value,
            scheduler=scheduler.value,
            parallel=parallel,
            seed=seed,
            watch=watch,
            watch_mode=watch_mode.value,
            grace=grace,
            reduction=reduction,
        )
        found, tree, axes = _input(pipeline, space, config, corpus, eval_corpus, override)
        opened = open_store(store)
        with ExitStack() as stack:
            listeners: list[Any] = [stack.enter_context(make_progress(err()))]
            if tracking is not False:
                tracked = tracker(opened, tracking_uri, always=tracking is True)
                listeners.append(stack.enter_context(tracked))
            try:
                result = run_sweep(
                    found.module,
                    tree,
                    axes,
                    options,
                    store=opened,
                    profile=make_profile(profile, address),
                    listeners=listeners,
                    name=check_run_name(name) if name is not None else None,
                    say=warn,
                )
            except SweepInterrupted as interrupted:
                answer.value = mask_secrets(interrupted.result.as_json())
                raise
        _show(answer, result)


def _input(
    pipeline: str,
    space: str,
    config: str | None,
    corpus: list[str] | None,
    eval_corpus: list[str] | None,
    override: list[str] | None,
) -> tuple[Any, dict[str, Any], Any]:
    """The pipeline, its config's plain values, and the space, from what was typed."""
    from goldcrest.cluster.config_file import config_tree
    from goldcrest.cluster.sweep_space import Space
    from goldcrest.pipelines.cli_config import corpus_fields
    from goldcrest.pipelines.discovery import find_config, load_pipeline

    found = load_pipeline(pipeline)
    tree = config_tree(
        file=find_config(pipeline, config),
        fields=corpus_fields(corpus, eval_corpus),
        overrides=override or (),
    )
    path = find_config("sweeps", space, what="space")
    assert path is not None
    return found, tree, Space.load(path)


def _show(answer: Answer, result: SweepResult) -> None:
    """The end of a sweep: the best trials, what was saved, where everything lies."""
    from goldcrest.cluster.progress import duration

    answer.value = mask_secrets(result.as_json())
    answer.code = 0 if result.status == "succeeded" else FAILED
    sign = 1.0 if result.mode == "max" else -1.0
    order = sorted(result.trials, key=lambda t: (t.metric is None, -sign * (t.metric or 0.0)))
    fields = list(result.trials[0].config) if result.trials else []
    rows = [_row(trial, fields) for trial in order[:_SHOWN]]
    print_table("", ["trial", "state", result.metric, *fields], rows)
    if len(order) > _SHOWN:
        say(f"and {len(order) - _SHOWN} more trials, see the report")
    states = [trial.state for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    good = result.status == "succeeded"
    say(
        f"{result.sweep} {result.status} in {duration(result.seconds)}: {counts or 'no trials'}",
        style="bold green" if good else "bold red",
    )
    ran, cached = result.executions["ran"], result.executions["cached"]
    say(f"step executions: {ran} ran, {cached} saved")
    if result.error is not None:
        say(f"error: {mask_text(result.error.message)}", style="red", error=True)
        if result.error.hint:
            say(f"       {mask_text(result.error.hint)}", error=True)
    elif "failed" in states:
        failed = next(trial for trial in result.trials if trial.failure)
        reason = failed.failure.message if failed.failure else ""
        warn(f"{states.count('failed')} trials failed; the first one: {mask_text(reason)}")
    if result.best_config:
        say(f"best config: {result.best_config}")
    if result.report:
        say(f"report: {result.report}")


def _row(trial: TrialResult, fields: list[str]) -> list[str]:
    from goldcrest.cluster.report import show

    config = mask_secrets(trial.config)
    values = [str(config[field]) for field in fields]
    return [str(trial.number), trial.state, show(trial.metric), *values]

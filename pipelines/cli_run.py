"""What `goldcrest run` and `goldcrest resume` do once their input is valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import Config
from goldcrest.cluster.config_file import flatten, validate
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.events import RunResult
from goldcrest.cluster.masking import MASK, mask_text
from goldcrest.cluster.progress import duration, make_progress
from goldcrest.cluster.report import ReportWriter, metric_tables, show
from goldcrest.cluster.tracking import Tracking, default_tracking_uri
from goldcrest.pipelines.cli_common import FAILED, Answer, err, print_table, say, warn
from goldcrest.pipelines.discovery import Pipeline, load_pipeline

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.cluster.store import Store


def failure_frame(pipeline: str, run_id: str | None) -> dict[str, Any]:
    """The JSON of a run that ended before there was a result."""
    return {
        "run": run_id,
        "pipeline": pipeline,
        "status": "failed",
        "seconds": 0.0,
        "steps": [],
        "metrics": {},
        "bundles": {},
        "report": None,
        "quarantined": 0,
    }


def execute(
    answer: Answer,
    pipeline: Pipeline,
    config: Config,
    *,
    store: Store,
    profile: Profile,
    tracking_uri: str | None,
    tracking: bool | None,
    run_id: str | None,
) -> None:
    """Run the pipeline with progress, report and tracking; fill in the answer; print the end."""
    from goldcrest.cluster.ray_session import inside_job
    from goldcrest.cluster.run import run

    if inside_job() and Path(store.uri).is_relative_to(Path.cwd()):
        warn("the store lies in this job's own folder, which Ray removes: give --store a place")
    last = _LastResult()
    with ExitStack() as stack:
        progress = stack.enter_context(make_progress(err()))
        listeners: list[Any] = [progress, ReportWriter()]
        if tracking is not False:
            listeners.append(
                stack.enter_context(tracker(store, tracking_uri, always=tracking is True))
            )
        try:
            run(
                pipeline.module,
                config,
                store=store,
                profile=profile,
                listeners=[*listeners, last],
                run_id=run_id,
            )
        finally:
            if last.result is not None:
                answer.value = last.result.as_json()
    if last.result is not None:
        show_result(last.result)
        answer.code = 0 if last.result.status == "succeeded" else FAILED


def tracker(store: Store, uri: str | None, *, always: bool) -> Tracking:
    """MLflow as a listener, beside the store unless `uri` names another place."""
    return Tracking(
        uri or default_tracking_uri(store.runs_folder),
        artifacts=store.runs_folder.parent / "mlflow" / "artifacts",
        warn=warn,
        always=always,
    )


class _LastResult:
    """A listener that keeps the result, also of a run that ends in an exception."""

    def __init__(self) -> None:
        self.result: RunResult | None = None

    def on_event(self, event: Any) -> None:
        """Keep the result of the last event."""
        self.result = getattr(event, "result", None)


def recorded_run(record: Mapping[str, Any]) -> tuple[Pipeline, Config, dict[str, Any]]:
    """Pipeline, config and profile as the record of a run holds them."""
    try:
        module, tree, name = str(record["module"]), dict(record["config"]), str(record["run"])
    except (KeyError, TypeError, ValueError):
        raise InputError("the record of this run is not complete; repeat its command") from None
    profile = dict(record.get("profile") or {})
    hidden = [field for field, value in flatten({**tree, **profile}).items() if value == MASK]
    if hidden:
        raise InputError(
            f"the record of run {name} keeps no secrets, and {', '.join(hidden)} is one",
            hint="repeat the run's command instead",
        )
    pipeline = load_pipeline(module.removeprefix("goldcrest.pipelines."))
    config = validate(pipeline.config_class, tree, where=f"the record of run {name}")
    return pipeline, config, profile


_MOST_COLUMNS = 10  # of a table that a terminal shows whole


def _columns_shown(columns: Sequence[str]) -> list[int]:
    """Places of the columns that fit: of a wide table the intervals are left to the report."""
    if len(columns) <= _MOST_COLUMNS:
        return list(range(len(columns)))
    return [place for place, name in enumerate(columns) if not name.endswith("_ci")]


def show_result(result: RunResult) -> None:
    """The end of a run: metrics by model, what failed, and where everything lies."""
    for table in metric_tables(result.as_json()["metrics"]):
        shown = _columns_shown(table.columns)
        rows = [[name, *(show(cells[place]) for place in shown)] for name, cells in table.rows]
        print_table(table.name, ["", *(table.columns[place] for place in shown)], rows)
    states = [step.state for step in result.steps]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    good = result.status == "succeeded"
    say(
        f"{result.pipeline} {result.status} in {duration(result.seconds)}: {counts}",
        style="bold green" if good else "bold red",
    )
    if result.quarantined:
        say(f"quarantined inputs: {result.quarantined}")
    if result.error is not None:
        step = f"step {result.error.step}: " if result.error.step else ""
        say(f"error: {step}{mask_text(result.error.message)}", style="red", error=True)
        if result.error.hint:
            say(f"       {mask_text(result.error.hint)}", error=True)
        for line in result.error.log:
            say(f"  | {mask_text(line)}", style="dim", error=True)
    for name, path in result.bundles.items():
        say(f"bundle {name}: {path}")
    if result.report:
        say(f"report: {result.report}")
    say(f"run: {result.run}")

"""The `goldcrest` command: run, plan, resume, sweep, serve, jobs, report, artifacts and others.

    goldcrest run speaker --config tiny -o clustering.settings.mu=4
    goldcrest plan speaker --format mermaid
    goldcrest resume last
    goldcrest submit speaker --config base --address http://head:8265

Nothing heavy is imported before a verb needs it: `--help` and a run that is wholly cached start
neither Ray nor torch nor MLflow.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from goldcrest import __version__
from goldcrest.pipelines import cli_artifacts, cli_config, cli_jobs, cli_serve, cli_sweep
from goldcrest.pipelines.cli_common import (
    FAILED,
    AddressOption,
    ConfigOption,
    CorpusOption,
    EvalCorpusOption,
    JsonOption,
    OverrideOption,
    PipelineArgument,
    ProfileOption,
    RunArgument,
    StoreOption,
    TrackingOption,
    TrackingUriOption,
    answering,
    check_run_name,
    find_run,
    find_sweep,
    make_profile,
    open_store,
    print_table,
    read_record,
    say,
    store_uri,
)

app = typer.Typer(
    name="goldcrest",
    help="Raw speech and text to small, fast, served models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_artifacts.app, name="artifacts")
app.add_typer(cli_config.app, name="config")
app.command()(cli_sweep.sweep)
app.command("serve")(cli_serve.serve)
cli_jobs.register(app)


class PlanFormat(StrEnum):
    """How `plan` prints."""

    text = "text"
    mermaid = "mermaid"
    json = "json"


@app.command()
def run(
    pipeline: PipelineArgument,
    config: ConfigOption = None,
    corpus: CorpusOption = None,
    eval_corpus: EvalCorpusOption = None,
    override: OverrideOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    address: AddressOption = None,
    tracking_uri: TrackingUriOption = None,
    tracking: TrackingOption = None,
    run_id: Annotated[str | None, typer.Option(metavar="NAME", help="name of this run")] = None,
    json_file: JsonOption = None,
) -> None:
    """Run a pipeline; steps whose results are in the store are not run again."""
    from goldcrest.pipelines.cli_run import execute, failure_frame
    from goldcrest.pipelines.discovery import load_pipeline

    with answering(json_file, failure_frame(pipeline, run_id)) as answer:
        found = load_pipeline(pipeline)
        made = cli_config.make_config(found, config, override, corpus, eval_corpus)
        execute(
            answer,
            found,
            made,
            store=open_store(store),
            profile=make_profile(profile, address),
            tracking_uri=tracking_uri,
            tracking=tracking,
            run_id=check_run_name(run_id) if run_id is not None else None,
        )


@app.command()
def resume(
    run_name: RunArgument,
    store: StoreOption = None,
    profile: ProfileOption = None,
    address: AddressOption = None,
    tracking_uri: TrackingUriOption = None,
    tracking: TrackingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Continue a run that was stopped: the same as repeating its command."""
    from goldcrest.pipelines.cli_run import execute, failure_frame, recorded_run

    with answering(json_file, failure_frame("", run_name)) as answer:
        opened = open_store(store)
        name, folder = find_run(opened, run_name)
        record = read_record(folder)
        found, made, recorded = recorded_run(record)
        execute(
            answer,
            found,
            made,
            store=opened,
            profile=make_profile(profile, address, recorded),
            tracking_uri=tracking_uri,
            tracking=tracking,
            run_id=name,
        )


@app.command()
def plan(
    pipeline: PipelineArgument,
    config: ConfigOption = None,
    corpus: CorpusOption = None,
    eval_corpus: EvalCorpusOption = None,
    override: OverrideOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    format_: Annotated[
        PlanFormat, typer.Option("--format", help="how to print it")
    ] = PlanFormat.text,
    json_file: JsonOption = None,
) -> None:
    """Show the steps, what is cached, what will run and why. Runs nothing."""
    import json

    from goldcrest.cluster.plan import make_plan
    from goldcrest.pipelines.discovery import load_pipeline

    with answering(json_file) as answer:
        found = load_pipeline(pipeline)
        made = cli_config.make_config(found, config, override, corpus, eval_corpus)
        planned = make_plan(
            found.module, made, open_store(store), profile=make_profile(profile, None)
        )
        answer.value = planned.as_json()
        if format_ is PlanFormat.mermaid:
            say(planned.mermaid())
        elif format_ is PlanFormat.json:
            say(json.dumps(answer.value, indent=2))
        else:
            say(planned.text())


@app.command()
def report(
    run_name: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="write it here instead")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="open it in a browser")] = False,
    store: StoreOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write the HTML report of a run or sweep again from its record, and say where it is."""
    from goldcrest.cluster import sweep_report
    from goldcrest.cluster.report import REPORT, read_events, render, write_text

    with answering(json_file) as answer:
        opened = open_store(store)
        sweep_folder = find_sweep(opened, run_name)
        if sweep_folder is not None:
            name, folder = run_name, sweep_folder
            page = sweep_report.render_again(folder)
        else:
            name, folder = find_run(opened, run_name)
            page = render(read_events(folder / "events.jsonl"))
        path = output if output is not None else folder / REPORT
        write_text(path, page)
        answer.value = {"run": name, "report": str(path)}
        say(str(path))
        if open_it:
            typer.launch(path.absolute().as_uri())


@app.command("list")
def list_all(json_file: JsonOption = None) -> None:
    """List the pipelines, their configs, and the methods that kernels offer."""
    from goldcrest.pipelines.discovery import (
        config_files,
        describe,
        kernel_methods,
        pipeline_files,
    )

    with answering(json_file) as answer:
        pipelines = {
            name: {"file": str(path), "about": describe(path), "configs": list(config_files(name))}
            for name, path in pipeline_files().items()
        }
        answer.value = {
            "pipelines": pipelines,
            "profiles": list(config_files("cluster")),
            "methods": kernel_methods(),
        }
        rows = [[name, ", ".join(p["configs"]), str(p["about"])] for name, p in pipelines.items()]
        print_table("Pipelines", ["name", "configs", "about"], rows)
        profiles: list[str] = answer.value["profiles"]
        print_table("Cluster profiles", ["name"], [[name] for name in profiles])
        methods: dict[str, list[str]] = answer.value["methods"]
        print_table(
            "Methods",
            ["family", "methods"],
            [[f, ", ".join(names)] for f, names in methods.items()],
        )


@app.command()
def doctor(
    store: StoreOption = None,
    address: AddressOption = None,
    tracking_uri: TrackingUriOption = None,
    json_file: JsonOption = None,
) -> None:
    """Check this machine: versions, memory, disk, store, Ray, training, GPU, tracking."""
    from goldcrest.cluster.doctor import diagnose, summary_lines

    with answering(json_file) as answer:
        reach = None if address in (None, "local") else address
        answer.value = diagnose(store=store_uri(store), address=reach, tracking_uri=tracking_uri)
        for line in summary_lines(answer.value["checks"]):
            say(line)
        answer.code = 0 if answer.value["ok"] else FAILED


@app.command()
def version(json_file: JsonOption = None) -> None:
    """Print the version."""
    with answering(json_file) as answer:
        answer.value = {"goldcrest": __version__, "python": platform.python_version()}
        say(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of `python -m goldcrest`."""
    if "RAY_JOB_STOP_SIGNAL" in os.environ:
        from goldcrest.cluster.jobs import heed_the_stop_signal

        heed_the_stop_signal()
    app(args=None if arguments is None else list(arguments), prog_name="goldcrest")


if __name__ == "__main__":
    main()

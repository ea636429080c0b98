"""`goldcrest submit|status|logs|stop`: run a pipeline as a job on a cluster, and look after jobs.

    goldcrest submit speaker --config base --store s3://lab/store --address http://head:8265
    goldcrest status                                  # the jobs of the cluster
    goldcrest logs 20261121-020300-speaker-1f3a -f

`submit` checks the config here, says what it is going to send, sends it, and runs `goldcrest run`
with the same options there; a job and its run have the same name. Without `--no-wait` it follows
the logs and ends with the job's own exit code; Ctrl-C leaves the job running.
"""

from __future__ import annotations

import ipaddress
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from goldcrest import __version__
from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.masking import is_secret_name, mask_text
from goldcrest.cluster.progress import duration
from goldcrest.cluster.report import file_size
from goldcrest.pipelines import cli_config
from goldcrest.pipelines.cli_common import (
    INTERRUPTED,
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
    out,
    print_table,
    say,
    store_uri,
    warn,
)

if TYPE_CHECKING:
    from goldcrest.cluster.job_package import Package
    from goldcrest.cluster.jobs import Job, Jobs

JobArgument = Annotated[str, typer.Argument(help="the name of a job, or `last`")]
JobAddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="the cluster's dashboard [default: $RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265]",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    for verb in (submit, status, logs, stop):
        app.command()(verb)


def submit(
    pipeline: PipelineArgument,
    config: ConfigOption = None,
    corpus: CorpusOption = None,
    eval_corpus: EvalCorpusOption = None,
    override: OverrideOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    address: JobAddressOption = None,
    tracking_uri: TrackingUriOption = None,
    tracking: TrackingOption = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="name of the run and of the job")
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="the working tree to send")
    ] = Path(),
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="leave this out too, as in .gitignore; repeatable"),
    ] = None,
    max_upload: Annotated[
        str, typer.Option(metavar="SIZE", help="refuse to send more than this")
    ] = "100MB",
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="set a variable for the job; repeatable"),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="COMMAND", help="Python on the cluster")
    ] = "python",
    wait: Annotated[bool, typer.Option(help="follow the logs until the job ends")] = True,
    json_file: JsonOption = None,
) -> None:
    """Run a pipeline as a job on a Ray cluster: send the working tree, follow the logs."""
    from goldcrest.cluster.job_package import check_size, collect
    from goldcrest.cluster.jobs import Jobs
    from goldcrest.cluster.run_record import new_run_id
    from goldcrest.pipelines.discovery import load_pipeline

    frame = {"job": run_id, "pipeline": pipeline, "status": "failed", "exit_code": None}
    with answering(json_file, frame) as answer:
        found = load_pipeline(pipeline)
        cli_config.make_config(found, config, override, corpus, eval_corpus)  # errors show here
        name = check_run_name(run_id or new_run_id(found.name.rpartition(".")[2]))
        environment = _environment(env or [])
        package, placed = _placed_files(
            collect(working_dir, exclude or []), found.name, config, profile
        )
        check_size(package, _size(max_upload))
        jobs = Jobs(address)
        where = job_store(store, jobs.address)
        command = [
            *(python, "-m", "goldcrest", "run", pipeline),
            *placed,
            *_repeated("-o", override),
            *_corpora(corpus, eval_corpus),
            *("--store", where, "--run-id", name, "--address", "auto"),
            *(["--tracking-uri", tracking_uri] if tracking_uri else []),
            *([] if tracking is None else ["--tracking" if tracking else "--no-tracking"]),
        ]
        _warn_of_secrets(override or [], environment, [where, tracking_uri or ""])
        facts = {"pipeline": pipeline, "run": name, "store": mask_text(where)}
        answer.value = _send(jobs, name, command, package, environment, facts)
        if wait:
            _follow(answer, jobs, name)
        else:
            say(f"follow it with: goldcrest logs {name} --follow --address {jobs.address}")


def _send(
    jobs: Jobs,
    name: str,
    command: list[str],
    package: Package,
    environment: dict[str, str],
    facts: dict[str, str],
) -> dict[str, Any]:
    """Tell what is sent, send it, and give back what is known of the job then."""
    _tell_package(package)
    packed = jobs.submit(
        command,
        package,
        job=name,
        environment=environment,
        facts={"goldcrest": __version__, **facts},
    )
    say(f"job {name} submitted to {jobs.address} ({file_size(packed)} packed)")
    return {
        "job": name,
        "status": "PENDING",
        "exit_code": None,
        **facts,
        "address": jobs.address,
        "package": {
            "files": len(package.files),
            "bytes": package.size,
            "packed_bytes": packed,
            "largest": [{"name": n, "bytes": size} for n, size in package.largest()],
            "left_out": {"stores": package.stores, "links": package.links_out},
        },
    }


def status(
    job: Annotated[
        str | None, typer.Argument(help="the name of a job, or `last`; left out: all jobs")
    ] = None,
    address: JobAddressOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show a job of the cluster, or all of them."""
    from goldcrest.cluster.jobs import Jobs

    with answering(json_file) as answer:
        jobs = Jobs(address)
        if job is None:
            found = jobs.all()
            answer.value = [_facts(each) for each in found]
            rows = [[each.id, each.state, _took(each), each.facts.get("store", "")]
                    for each in found]  # fmt: skip
            print_table("", ["job", "state", "took", "store"], rows)
            return
        one = jobs.find(_job_name(jobs, job))
        answer.value = _facts(one)
        for label, value in answer.value.items():
            if value not in (None, ""):
                say(f"{label:<10} {value}")


def logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="until the job ends; its exit code is ours")
    ] = False,
    address: JobAddressOption = None,
    json_file: JsonOption = None,
) -> None:
    """Print what a job has printed."""
    from goldcrest.cluster.jobs import Jobs

    with answering(json_file) as answer:
        jobs = Jobs(address)
        name = _job_name(jobs, job)
        if follow:
            answer.value = {"job": name}
            _follow(answer, jobs, name)
            return
        text = mask_text(jobs.logs(name))
        answer.value = {"job": name, "log": text}
        _print(text)


def stop(job: JobArgument, address: JobAddressOption = None, json_file: JsonOption = None) -> None:
    """End a job in good order, as Ctrl-C would; submitting it again continues its work."""
    from goldcrest.cluster.jobs import Jobs

    with answering(json_file) as answer:
        jobs = Jobs(address)
        ended = jobs.stop(_job_name(jobs, job))
        answer.value = _facts(ended)
        if not ended.final:
            raise GoldcrestError(f"job {ended.id} is {ended.state} still", hint="try again")
        say(f"job {ended.id}: {ended.state}")


# ------------------------------------------------------------------------------ the command there


def job_store(given: str | None, address: str) -> str:
    """The store of a job: as in a run here, but never a relative path, which there means nothing.

    A cluster on another machine needs to be told: this machine's default folder is not there.
    """
    named = given or os.environ.get("GOLDCREST_STORE")
    if named is None and not is_loopback(address):
        raise InputError(
            "a job on another machine must be told where its results go",
            hint="give --store a folder that all nodes share, or the URI of a bucket",
        )
    uri = store_uri(given)
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def is_loopback(address: str) -> bool:
    """Whether a URL leads to this machine by its loopback."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _placed_files(
    package: Package, pipeline: str, config: str | None, profile: str | None
) -> tuple[Package, list[str]]:
    """`--config` and `--profile` as the job finds them: files that are sent, or by their names.

    With the package, which then has those files: the best config of a sweep lies in a store, which
    packages leave out or which lies elsewhere.
    """
    from goldcrest.cluster.job_package import including
    from goldcrest.pipelines.discovery import config_files, find_config

    options = []
    for option, of, given in (("--config", pipeline, config), ("--profile", "cluster", profile)):
        what = option.removeprefix("--")
        path = find_config(of, given, what=what)
        if path is None or given is None:
            continue
        inside = path.resolve().is_relative_to(package.root)
        if not inside and given in config_files(of):  # comes with the goldcrest installed there
            options += [option, given]
            continue
        package, placed = including(package, path, f"{what}{path.suffix}")
        options += [option, placed]
    return package, options


def _corpora(corpus: list[str] | None, eval_corpus: list[str] | None) -> list[str]:
    """Corpora as absolute paths where they are here; all nodes must see them there too."""
    fields = cli_config.corpus_fields(corpus, eval_corpus)
    return [
        *_repeated("--corpus", fields.get("corpus.paths")),
        *_repeated("--eval-corpus", fields.get("corpus.eval_paths")),
    ]


def _repeated(option: str, values: list[str] | None) -> list[str]:
    return [word for value in values or [] for word in (option, value)]


def _environment(given: list[str]) -> dict[str, str]:
    wrong = [text for text in given if not text.partition("=")[0].isidentifier()]
    if wrong or any("=" not in text for text in given):
        shown = (wrong or given)[0].partition("=")[0]
        raise InputError(f"--env '{shown}' is not a variable", hint="write it as NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def _size(text: str) -> int:
    from goldcrest.cluster.profile import parse_bytes

    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise InputError(f"--max-upload: {error}") from None


def _warn_of_secrets(overrides: list[str], environment: dict[str, str], uris: list[str]) -> None:
    """Ray shows a job's command and environment to whoever holds the cluster's token."""
    fields = [text.partition("=")[0] for text in overrides]
    named = [f for f in fields if any(map(is_secret_name, f.split(".")))]
    named += [name for name in environment if is_secret_name(name)]
    named += [mask_text(uri) for uri in uris if mask_text(uri) != uri]
    if named:
        warn(f"whoever may see the cluster's jobs can read {', '.join(named)}")


# ------------------------------------------------------------------------------------- what is said


def _tell_package(package: Package) -> None:
    """The report before anything is sent."""
    largest = ", ".join(f"{name} ({file_size(size)})" for name, size in package.largest())
    say(f"sending {len(package.files)} files, {file_size(package.size)}, of {package.root}")
    say(f"largest: {largest}")
    if package.stores:
        say(f"left out, stores: {', '.join(package.stores)}")
    if package.links_out:
        say(f"left out, links that lead outside: {', '.join(package.links_out)}")


def _follow(answer: Answer, jobs: Jobs, name: str) -> None:
    """Print the job's log until it ends; answer and exit code are the job's."""
    from goldcrest.cluster.jobs import exit_code

    try:
        ended = jobs.follow(name, lambda text: _print(mask_text(text)))
    except KeyboardInterrupt:
        answer.value |= {"status": "RUNNING", "exit_code": None}
        answer.code = INTERRUPTED
        where = f"{name} --address {jobs.address}"
        say(f"job {name} goes on without us", error=True)
        say(f"       goldcrest logs -f {where}   or   goldcrest stop {where}", error=True)
        return
    answer.code = exit_code(ended)
    answer.value |= {**_facts(ended), "exit_code": answer.code}
    good = ended.state == "SUCCEEDED"
    say(f"job {name}: {ended.state} after {_took(ended)}", style="" if good else "bold red")
    if not good and ended.exit_code is None and ended.message:
        say(f"error: {ended.message}", style="red", error=True)  # it failed before its command ran


def _print(text: str) -> None:
    """A job's own words, as they are, beside what is said to machines."""
    stream = out().file
    stream.write(text)
    stream.flush()


def _facts(job: Job) -> dict[str, Any]:
    """A job as plain values."""
    return {
        "job": job.id,
        "status": job.state,
        "exit_code": job.exit_code,
        "run": job.facts.get("run"),
        "store": job.facts.get("store"),
        "started": job.started,
        "ended": job.ended,
        "command": job.command,
        "message": job.message,
    }


def _took(job: Job) -> str:
    if job.started is None:
        return ""
    return duration((job.ended or time.time()) - job.started)


def _job_name(jobs: Jobs, given: str) -> str:
    """`given`, or the name of the newest job for `last`."""
    if given != "last":
        return check_run_name(given)
    every = jobs.all()
    if not every:
        raise InputError(f"the cluster at {jobs.address} has no job yet")
    return every[-1].id

"""What the verbs of the command line share: options, answers for people and machines, exit codes.

Exit codes: 0 all is well, 1 the run (or check) failed, 2 bad input and nothing was started,
130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.json_text import json_text
from goldcrest.cluster.masking import mask_text

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.cluster.store import Store

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DEFAULT_STORE = ".goldcrest/store"
_STOPPED = "interrupted; the same command continues where it stopped"
_PLAIN_WIDTH = 160  # columns where there is no terminal to ask
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

PipelineArgument = Annotated[str, typer.Argument(help="a pipeline, see `goldcrest list`")]
RunArgument = Annotated[str, typer.Argument(help="the name of a run, or `last`")]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file, or a name such as `tiny`"),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--override", "-o", metavar="FIELD=VALUE", help="override one field; repeatable"),
]
CorpusOption = Annotated[
    list[str] | None,
    typer.Option("--corpus", metavar="DIR", help="a corpus to train on; repeatable"),
]
EvalCorpusOption = Annotated[
    list[str] | None,
    typer.Option("--eval-corpus", metavar="DIR", help="a corpus only to evaluate on; repeatable"),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        help=f"artifact store: a folder or a URI [default: $GOLDCREST_STORE or {DEFAULT_STORE}]",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="write the result as JSON; `-`: standard output"),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="FILE", help="cluster profile: a YAML file or a name such as `laptop`"
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Ray: local, auto, or the address of a cluster"),
]
TrackingUriOption = Annotated[
    str | None,
    typer.Option(metavar="URI", help="MLflow tracking URI [default: SQLite inside the store]"),
]
TrackingOption = Annotated[
    bool | None,
    typer.Option(
        "--tracking/--no-tracking",
        help="track with MLflow always or never [default: when a step runs]",
    ),
]

_machine_output: list[Path] = []  # holds `-` while a verb's JSON goes to the standard output


def out() -> Console:
    """Where results for people go: the standard output, unless that is for a machine."""
    return _console(sys.stderr if _machine_output else sys.stdout)


def err() -> Console:
    """Where progress, warnings and errors go: the standard error."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    plain = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=plain, highlight=False, soft_wrap=False)


def say(text: str, *, style: str = "", error: bool = False) -> None:
    """One line of text, taken literally, never cut or wrapped."""
    (err() if error else out()).print(Text(text, style=style), soft_wrap=True)


def warn(text: str) -> None:
    """A warning on the standard error."""
    say(f"warning: {text}", style="yellow", error=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without frames; cells are literal text, columns of numbers line up on the right."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index]]
        numeric = bool(cells) and all(re.match(r"^[\[\-+]?[\d.]", cell) for cell in cells)
        justify: Any = "right" if numeric and index else "left"
        table.add_column(Text(column), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        say(title, style="bold")
    out().print(table)


# --------------------------------------------------------------------------------- answering


@dataclass
class Answer:
    """What a verb answers to machines, and its exit code."""

    value: Any = None
    code: int = 0


@contextmanager
def answering(json_file: Path | None, failure: dict[str, Any] | None = None) -> Iterator[Answer]:
    """Run a verb's body: errors become sentences and exit codes, the answer becomes JSON.

    `failure` is the JSON's frame when the verb ends in an error: `{"error": {...}}` joins it.
    """
    prepare_json(json_file)
    _machine_output[:] = [json_file] if json_file is not None and str(json_file) == "-" else []
    answer = Answer()
    started = time.monotonic()

    def failed(code: int, message: str, hint: str | None) -> None:
        answer.code = code
        error = {"step": None, "message": message, "hint": hint}
        if answer.value is None:
            answer.value = dict(failure or {})
            if "seconds" in answer.value:
                answer.value["seconds"] = round(time.monotonic() - started, 3)
        if isinstance(answer.value, dict) and answer.value.get("error") is None:
            answer.value["error"] = error

    try:
        yield answer
    except GoldcrestError as error:
        message = mask_text(error.message)
        hint = mask_text(error.hint) if error.hint else None
        failed(BAD_INPUT if isinstance(error, InputError) else FAILED, message, hint)
        say(f"error: {message}", style="red", error=True)
        if hint:
            say(f"       {hint}", error=True)
    except KeyboardInterrupt:
        failed(INTERRUPTED, _STOPPED, None)
        say(_STOPPED, error=True)
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - machines are owed their JSON in any case
        sys.stderr.write(mask_text(traceback.format_exc()))
        message = mask_text(f"unexpected {type(error).__name__}: {error}")
        failed(FAILED, message, "a fault of goldcrest or of this machine: see the lines above it")
        say(f"error: {message}", style="red", error=True)
    if json_file is not None:
        write_json(json_file, answer.value)
    if answer.code:
        raise typer.Exit(answer.code)


def prepare_json(path: Path | None) -> None:
    """Refuse a `--json` file that cannot be written before anything else is done."""
    if path is None or str(path) == "-":
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refused = path.is_dir() or not os.access(path.parent, os.W_OK)
    except OSError:
        refused = True
    if refused:
        say(f"error: the file {path} of --json cannot be written", style="red", error=True)
        raise typer.Exit(BAD_INPUT)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, in full or not at all; `-` is the standard output."""
    text = json_text(value, indent=2, allow_nan=False, default=str) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        say(f"error: {path} could not be written: {error}", style="red", error=True)
        raise typer.Exit(FAILED) from None


# ------------------------------------------------------------------------------ store and runs


def store_uri(given: str | None) -> str:
    """The store's URI: the option, else `$GOLDCREST_STORE`, else a folder here."""
    return given or os.environ.get("GOLDCREST_STORE") or DEFAULT_STORE


def open_store(given: str | None) -> Store:
    """The store that the options name."""
    from goldcrest.cluster.store import Store

    return Store.open(store_uri(given))


def make_profile(
    given: str | None, address: str | None, recorded: dict[str, Any] | None = None
) -> Profile:
    """The cluster profile from a file, a name, or a run's record; `address` replaces its own."""
    from goldcrest.cluster.profile import Profile
    from goldcrest.pipelines.discovery import find_config

    path = find_config("cluster", given, what="profile")
    profile = Profile.load(path) if path is not None else Profile(**(recorded or {}))
    if address is None:
        return profile
    return profile.model_copy(update={"ray": profile.ray.model_copy(update={"address": address})})


def check_run_name(name: str) -> str:
    """`name` if it can name a run (it becomes a folder), else InputError."""
    if not _RUN_NAME.fullmatch(name):
        raise InputError(
            f"'{name}' is not the name of a run", hint="letters, digits, '.', '_' and '-' only"
        )
    return name


def find_run(store: Store, name: str) -> tuple[str, Path]:
    """Name and folder of a recorded run; `last` is the one that was touched last."""
    import difflib

    names = store.runs()
    if name == "last" and names:
        name = names[-1]
    if check_run_name(name) not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        recent = f" (newest: {', '.join(names[-3:])})" if names else " (it has none yet)"
        where = mask_text(store.uri)
        raise InputError(f"the store {where} has no run '{name}'{guess}{recent}")
    return name, store.run_folder(name)


def find_sweep(store: Store, name: str) -> Path | None:
    """The folder of the sweep of that name; None where there is none."""
    folder = store.runs_folder / check_run_name(name)
    return folder if (folder / "sweep.json").is_file() else None


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run's `run.json`; InputError where it is not readable."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the record {path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"the record {path} is not one of a run")
    return record

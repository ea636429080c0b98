"""`goldcrest artifacts ls|show|verify|gc|lineage`: look after the store."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from goldcrest.cluster.api import parse_duration
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.masking import mask_secrets
from goldcrest.cluster.progress import duration
from goldcrest.cluster.report import file_size
from goldcrest.pipelines.cli_common import (
    FAILED,
    JsonOption,
    StoreOption,
    answering,
    find_run,
    open_store,
    out,
    print_table,
    say,
)

if TYPE_CHECKING:
    from rich.tree import Tree

    from goldcrest.cluster.store import Store

app = typer.Typer(no_args_is_help=True, help="list, inspect, verify and clean the artifact store")

_PREFIX = re.compile(r"[0-9a-f]{4,64}")
KeyArgument = Annotated[
    str, typer.Argument(help="a key, the beginning of one, or a step (its newest artifact)")
]


def find_key(store: Store, given: str) -> str:
    """The one key that begins with `given`, or the newest artifact of the step `given`."""
    entries = list(store.entries())
    if _PREFIX.fullmatch(given):
        keys = [entry["key"] for entry in entries if entry["key"].startswith(given)]
        if len(keys) > 1:
            raise InputError(f"{len(keys)} artifacts begin with '{given}'", hint="give more digits")
        if keys:
            return str(keys[0])
    same = [entry for entry in entries if entry.get("step") == given]
    if same:
        return str(max(same, key=lambda entry: str(entry.get("created", "")))["key"])
    steps = sorted({str(entry.get("step", "")) for entry in entries})
    hint = f"steps with artifacts: {', '.join(steps)}" if steps else "the store is empty"
    raise InputError(f"the store has no artifact '{given}'", hint=hint)


def total_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of an artifact's members as its manifest lists them."""
    return sum(int(facts["bytes"]) for facts in manifest.get("files", {}).values())


@app.command("ls")
def list_artifacts(
    step: Annotated[str | None, typer.Option("--step", help="only artifacts of this step")] = None,
    store: StoreOption = None,
    json_file: JsonOption = None,
) -> None:
    """List the artifacts in the store, oldest first."""
    with answering(json_file) as answer:
        entries = [e for e in open_store(store).entries() if step in (None, e.get("step"))]
        entries.sort(key=lambda entry: str(entry.get("created", "")))
        answer.value = [
            {
                **{name: entry.get(name) for name in ("key", "step", "task", "created", "run")},
                "seconds": entry.get("seconds"),
                "bytes": total_bytes(entry),
            }
            for entry in entries
        ]
        rows = [
            [
                str(row["key"])[:12],
                str(row["step"]),
                str(row["created"])[:19],
                duration(float(row["seconds"] or 0.0)),
                file_size(row["bytes"]),
                str(row["run"] or ""),
            ]
            for row in answer.value
        ]
        print_table("", ["key", "step", "made", "took", "size", "run"], rows)
        say(f"{len(rows)} artifacts, {file_size(sum(row['bytes'] for row in answer.value))}")


@app.command()
def show(key: KeyArgument, store: StoreOption = None, json_file: JsonOption = None) -> None:
    """Print an artifact's manifest and the folder it lies in."""
    with answering(json_file) as answer:
        opened = open_store(store)
        found = find_key(opened, key)
        artifact = opened.find(found, verify=False)
        if artifact is None:
            raise InputError(f"the artifact {found[:12]} is not there any more")
        answer.value = {"path": str(artifact.path), **mask_secrets(dict(artifact.manifest))}
        say(json.dumps(answer.value, indent=2, sort_keys=True, ensure_ascii=False, default=str))


@app.command()
def verify(
    key: Annotated[
        str | None, typer.Argument(help="a key or step; left out: every artifact")
    ] = None,
    store: StoreOption = None,
    json_file: JsonOption = None,
) -> None:
    """Check every byte against its checksum; what is damaged is quarantined (exit code 1)."""
    with answering(json_file) as answer:
        opened = open_store(store)
        problems = opened.verify(find_key(opened, key) if key else None)
        answer.value = {"ok": not problems, "problems": problems}
        for problem in problems:
            say(f"{problem['key'][:12]}  {problem['step']}: {problem['reason']}", style="red")
        say(
            "every checksum is right"
            if not problems
            else "quarantined; the next run makes it again"
        )
        answer.code = FAILED if problems else 0


@app.command()
def gc(
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="also remove artifacts older than this (90s, 10m, 2h, 30d) that no kept run uses, "
            "and checkpoints of steps given up so long ago (a day at least)",
        ),
    ] = None,
    keep_run: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="keep the artifacts of this run; repeatable"),
    ] = None,
    keep_runs: Annotated[
        int, typer.Option(min=0, help="keep the artifacts of this many newest runs")
    ] = 10,
    dry_run: Annotated[bool, typer.Option(help="only list what would be removed")] = False,
    store: StoreOption = None,
    json_file: JsonOption = None,
) -> None:
    """Remove leftovers of dead runs; with --older-than, old artifacts and checkpoints too.

    The records of runs stay.
    """
    with answering(json_file) as answer:
        opened = open_store(store)
        age = parse_duration(older_than) if older_than is not None else None
        kept = [find_run(opened, name)[0] for name in keep_run or []]
        newest = opened.runs()[-keep_runs:] if keep_runs else []
        keep = None if age is None else _keys_of(opened, {*kept, *newest})
        rows = opened.gc(keep, older_than=age or 0.0, dry_run=dry_run)
        answer.value = {"dry_run": dry_run, "removed": rows}
        cells = [[r["what"], file_size(r["bytes"]), r["reason"], r["path"]] for r in rows]
        if cells:
            print_table("", ["what", "size", "why", "where"], cells)
        total = file_size(sum(row["bytes"] for row in rows))
        say(f"{total} {'would be' if dry_run else 'were'} freed in {len(rows)} places")


def _keys_of(store: Store, runs: set[str]) -> set[str]:
    """Keys of the steps that the records of `runs` name."""
    keys = set()
    for run in runs:
        for record in store.run_records(run):
            plan = record.get("plan") or {}
            keys |= {str(step["key"]) for step in plan.get("steps", [])}
    return keys


@app.command()
def lineage(key: KeyArgument, store: StoreOption = None, json_file: JsonOption = None) -> None:
    """Show what an artifact was made from, back to the beginning."""
    from rich.tree import Tree

    with answering(json_file) as answer:
        opened = open_store(store)
        answer.value = opened.lineage(find_key(opened, key))
        root = Tree(_label(answer.value), guide_style="dim")
        _grow(root, answer.value, set())
        out().print(root)


def _label(node: dict[str, Any], parameter: str = "") -> Any:
    from rich.text import Text

    if node.get("missing"):
        facts = "no longer in the store"
    else:
        facts = f"{node.get('created', '')!s:.19}  {duration(float(node.get('seconds') or 0.0))}"
    name = node.get("step") or "?"
    prefix = f"{parameter} = " if parameter and parameter != name else ""
    return Text.assemble(prefix, (str(name), "bold"), f"  {node['key'][:12]}  {facts}")


def _grow(tree: Tree, node: dict[str, Any], met: set[str]) -> None:
    """Add the inputs of `node`; an artifact met before is named but not unfolded again."""
    for parameter, made in (node.get("inputs") or {}).items():
        if made is None:
            continue
        branch = tree.add(_label(made, parameter))
        if made["key"] not in met:
            met.add(made["key"])
            _grow(branch, made, met)

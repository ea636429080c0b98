"""Hostile input to the user's face: YAML that is more than data, HTML in every text, names of
runs and figures that climb out of their folders, secrets on their way into files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.artifact import MANIFEST
from goldcrest.cluster.config_file import MAX_BYTES, parse_yaml, read_yaml
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.report import render
from goldcrest.pipelines import cli

TOYS = Path(__file__).parents[1] / "pipelines"

# ------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "!!python/object/new:type {}",
        "a: !new:os.system [ls]",
        "a: !include /etc/passwd",
        "a: !!binary aGk=",
        "a: !!set {x}",
        "a: !!timestamp 2001-01-01",
        "a: !!str 1",
    ],
)
def test_no_tag_is_obeyed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="tags"):
        parse_yaml(text, where="file")
    assert list(tmp_path.iterdir()) == []


def test_a_billion_laughs_is_refused_at_once() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{c}: &{c} [{', '.join(['*' + p] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    begun = time.monotonic()
    with pytest.raises(InputError, match="anchors and aliases"):
        parse_yaml("\n".join(lines), where="file")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000 + "]" * 5000, "nested deeper"),
        ("{a: " * 5000, "nested deeper"),
        ("- " * 5000 + "x", "nested deeper"),
        ("[" + "1," * 60_000 + "]", "more than"),
        ("a: " + "x" * (MAX_BYTES + 1), "larger than"),
        ("a: " + "9" * 10_000, "not valid YAML"),
        ("? {a: b}\n: c", "plain text"),
        ("<<: {a: 1}\n<<: {b: 2}", "given twice"),
        ("a: \x00", "not valid YAML"),
        ("a: \x1b[31m", "not valid YAML"),
    ],
)
def test_too_much_of_anything_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_yaml(text, where="file")


def test_merge_keys_are_plain_names() -> None:
    """`<<` merges in YAML 1.1; here it is a field like any other, and so an unknown one."""
    assert parse_yaml("{<<: {a: 1}}", where="file") == {"<<": {"a": 1}}


def test_a_huge_file_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(InputError, match="larger than"):
        read_yaml(path)


# ------------------------------------------------------------------------------------- HTML

EVIL = "</title></style><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7*7 }}"


class Page(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def evil_events(folder: Path) -> list[dict[str, Any]]:
    """A run in which every text that comes from data is hostile."""
    manifest = {
        "config": {EVIL: EVIL, "list": [EVIL]},
        "metrics": {EVIL: {EVIL: 1, "text": EVIL}},
        "measurements": {EVIL: 2.5},
        "inputs": {EVIL: EVIL},
        "files": {
            EVIL: {"bytes": 1},
            "figures/../../secret.png": {"bytes": 1},
            "figures//etc/passwd.png": {"bytes": 1},
            f"figures/{EVIL}.png": {"bytes": 1},
        },
        "packages": {EVIL: EVIL},
        "host": {EVIL: EVIL},
        "run": EVIL,
        "created": EVIL,
        "version": EVIL,
        "source": EVIL,
        "seed": 1,
    }
    failure = {"step": EVIL, "message": EVIL, "hint": EVIL, "log": [EVIL, EVIL]}
    step = {"name": EVIL, "task": EVIL, "key": EVIL, "reason": EVIL, "notice": EVIL}
    result = {
        "status": EVIL,
        "seconds": 1.0,
        "metrics": {EVIL: {EVIL: {EVIL: EVIL}}, "plain": EVIL},
        "bundles": {EVIL: EVIL},
        "error": {"step": EVIL, "message": EVIL, "hint": EVIL},
        "quarantined": EVIL,
    }
    common: dict[str, Any] = {"step": EVIL, "reason": EVIL, "place": EVIL, "key": EVIL}
    return [
        {"event": "RunStarted", "time": 1.0, "run_id": EVIL, "pipeline": EVIL}
        | {"config": {EVIL: EVIL}, "folder": EVIL}
        | {"plan": {"steps": [step | {"inputs": {EVIL: None}}]}},
        {"event": "StepChanged", "time": 1.5, "state": "running", **common},
        {"event": "StepLog", "time": 1.6, "step": EVIL, "index": 0, "row": {EVIL: 1.0}},
        {"event": "StepLog", "time": 1.7, "step": EVIL, "index": 1, "row": {EVIL: 2.0}},
        {"event": "StepChanged", "time": 2.0, "state": EVIL, **common, "seconds": 1.0}
        | {"manifest": manifest, "path": str(folder), "failure": failure},
        {"event": "RunFinished", "time": 3.0, "result": result},
    ]


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    clean = {tag for tag, _ in Page(render(evil_events(tmp_path)[:1])).tags}
    html = render(evil_events(tmp_path))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "49" not in html.split("<main>")[1].replace("7*7", "")[:2000]  # no template in data
    page = Page(html)
    allowed = clean | {"a", "pre", "polyline", "circle", "line", "path", "figure", "ul", "li"}
    allowed |= {"b", "br", "h3", "rect", "svg", "g", "text", "title", "table", "tr", "td", "th"}
    assert {tag for tag, _ in page.tags} <= allowed
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")  # type: ignore[union-attr]


def test_figures_are_read_only_from_inside_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "a" / "artifact").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    html = render(evil_events(tmp_path / "a" / "artifact"))
    assert "data:image/png" not in html


# ------------------------------------------------------------------------------- names of runs


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc",
        "/etc",
        "..",
        ".",
        "a/b",
        "a\\b",
        "a\0b",
        "",
        " ",
        "-x y",
        "x" * 200,
        "é",
        "a\nb",
    ],
)
@pytest.mark.parametrize("verb", ["resume", "report", "run"])
def test_runs_cannot_climb_out_of_the_store(
    name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOYS))
    words = ["run", "toys.garden", "--run-id", name] if verb == "run" else [verb, "--", name]
    store = ["--store", "store"]
    with pytest.raises(SystemExit) as end:
        cli.main([words[0], *store, *words[1:]])
    assert end.value.code == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}
    assert list((tmp_path / "store").rglob("run.json")) == []


# ------------------------------------------------------------------------------------- secrets

SECRET = "hush-hush-7731"


def test_secrets_reach_no_manifest_record_or_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a run writes down about a config with a secret in it."""
    monkeypatch.syspath_prepend(str(TOYS))
    from toys import garden

    from goldcrest.cluster.events import RunStarted, StepChanged
    from goldcrest.cluster.plan import make_plan
    from goldcrest.cluster.run_record import EventFile, RunRecord, plain_config
    from goldcrest.cluster.store import Store

    store = Store.open(tmp_path / "store")
    config = garden.Config(grow=garden.GrowConfig(hub_token=SECRET))
    plan = make_plan(garden, config, store)
    folder = store.run_folder("r")
    monkeypatch.setattr(sys, "argv", ["goldcrest", "run", "-o", f"grow.hub_token={SECRET}"])
    RunRecord.begin(
        folder,
        run_id="r",
        plan=plan,
        module="toys.garden",
        config=plain_config(config),
        store_uri=f"s3://KEY:{SECRET}@bucket",
        profile={"ray": {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}}},
    )
    events = EventFile(folder / "events.jsonl")
    values = plain_config(config)
    events.on_event(
        RunStarted(run_id="r", pipeline="garden", plan=plan, config=values, folder=folder)
    )
    manifest = {"config": {"hub_token": SECRET}}
    events.on_event(StepChanged(run_id="r", step="grow", state="ran", manifest=manifest))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "events.jsonl"} <= {path.name for path in written}
    for path in written:
        assert SECRET not in path.read_text(), path
    assert MANIFEST not in {path.name for path in written}


PRINTS_SECRETS = """
import os, sys
from pathlib import Path
from goldcrest.cluster.worker import captured_output
with captured_output(Path(sys.argv[1])):
    print("loading s3://KEY:%s@bucket, batch 3 of 7" % sys.argv[2])
    os.write(2, ("native code says: hub_token=%s" % sys.argv[2]).encode() + bytes([10, 255, 10]))
"""


def test_what_steps_print_keeps_no_secrets(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "grow.log"
    log.parent.mkdir()
    log.write_text("an attempt that was killed: db_password=" + SECRET + "\n")
    subprocess.run([sys.executable, "-c", PRINTS_SECRETS, str(log), SECRET], check=True)
    lines = log.read_text().splitlines()
    assert SECRET not in log.read_text()
    assert lines[1:3] == [
        "loading s3://***@bucket, batch 3 of 7", "native code says: hub_token=***"
    ]  # fmt: skip
    assert [path.name for path in log.parent.iterdir()] == ["grow.log"]


def test_a_changed_secret_is_not_named_in_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` compares with an earlier manifest; neither side of a secret is shown."""
    monkeypatch.syspath_prepend(str(TOYS))
    from toys import garden

    from goldcrest.cluster.masking import mask_secrets
    from goldcrest.cluster.plan import make_plan
    from goldcrest.cluster.store import Store

    store = Store.open(tmp_path / "store")
    config = garden.Config(grow=garden.GrowConfig(hub_token=SECRET))
    step = next(p.step for p in make_plan(garden, config, store).steps if p.step.name == "grow")
    manifest = {
        "schema": 1,
        "task": step.task_name,
        "step": "grow",
        "version": step.task.version,
        "config": mask_secrets(step.canonical),
        "seed": step.seed,
        "inputs": dict(step.input_keys),
    }
    with store.lease(step.key, owner="test") as lease:
        work = store.begin(step.key, lease)
        (work / "bundle.json").write_text("{}")
        store.commit(step.key, work, manifest, lease)
    other = garden.Config(grow=garden.GrowConfig(hub_token="another-secret", water=2))
    text = make_plan(garden, other, store).text()
    assert "config `water` changed 0.5 -> 2.0" in text
    assert SECRET not in text
    assert "another-secret" not in text
    assert json.dumps(make_plan(garden, other, store).as_json()).count("secret") == 0

"""The `goldcrest` command, from its options to its exit codes.

One cold run of the toy pipeline in a process of its own (`garden_store`) serves all tests that need
results; verbs that start nothing are called in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.store import Store
from goldcrest.pipelines import cli

TOYS = Path(__file__).parent
ROOT = TOYS.parents[1]
GARDEN = "toys.garden"


def goldcrest(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, without a terminal."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TOYS}",
        "HOME": os.environ.get("HOME", "/root"),
        **more,
    }
    environment.pop("GOLDCREST_STORE", None)
    return subprocess.run(
        [sys.executable, "-m", "goldcrest", *arguments],
        cwd=cwd,
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class Said:
    """What a verb printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    """Call the command in this process, in an empty working directory."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOLDCREST_STORE", raising=False)

    def called(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return Said(int(end.value.code or 0), captured.out, captured.err)

    return called


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a store in which the toy pipeline has run once, and what that run said."""
    folder = tmp_path_factory.mktemp("cold")
    done = goldcrest(
        "run", GARDEN, "--json", "out/result.json", "--run-id", "first",
        "-o", "grow.hub_token=hush", cwd=folder,
    )  # fmt: skip
    return folder, done


@pytest.fixture
def garden(cold: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that store, as text for `--store`, taken while MLflow's database is at rest."""
    source, copy = cold[0] / ".goldcrest" / "store", tmp_path / "store"
    limit = time.monotonic() + 60
    while True:
        try:
            shutil.copytree(source, copy, symlinks=True)
            return copy
        except shutil.Error:  # a journal came or went
            assert time.monotonic() < limit
            shutil.rmtree(copy)
            time.sleep(0.5)


def test_files_of_a_config_are_those_of_the_folder_where_it_is_typed(
    call: Any, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("1 a b")
    (tmp_path / "own.yaml").write_text("corpus: {paths: [bed]}")
    said = call(
        "config", "show", "speaker", "--config", "own.yaml", "-o", "evaluate.trials=list.txt",
        "-o", "features.augment.noise_paths=[../noise, 'datasets://org/noise']", "--json", "-",
    )  # fmt: skip
    shown = json.loads(said.out)
    assert shown["evaluate"]["trials"] == str(tmp_path / "list.txt")
    assert shown["corpus"]["paths"] == [str(tmp_path / "bed")]
    noises = shown["features"]["augment"]["noise_paths"]
    assert noises == [str(tmp_path / "../noise"), "datasets://org/noise"]


# ------------------------------------------------------------------------------- a whole run


def test_a_cold_run(cold: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = cold
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert set(result) == {
        "run", "pipeline", "status", "seconds", "steps", "metrics", "bundles", "report",
        "quarantined", "error",
    }  # fmt: skip
    assert result["run"] == "first"
    assert result["status"] == "succeeded"
    assert [(step["name"], step["state"]) for step in result["steps"]] == [
        (name, "ran") for name in ("sow", "grow", "prune", "weigh")
    ]
    # The pipeline's own numbers: 3 days x 0.5 litres x 3 seeds.
    assert result["metrics"]["harvest"] == 4.5
    assert result["metrics"]["models"]["dense"] == {"bytes": 10, "parameters": 3, "rtf": 0.25}
    assert result["quarantined"] == 1
    assert (Path(result["bundles"]["dense"]) / "bundle.json").is_file()
    assert Path(result["report"]).is_file()
    assert "\x1b" not in done.stdout + done.stderr
    for wanted in ("verification", "ivector", "min_dcf_0.01", result["report"], "bundle dense"):
        assert wanted in done.stdout
    assert "grow: running" in done.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["result.json"]


def test_the_secret_of_that_run_is_nowhere(cold: tuple[Path, Any]) -> None:
    folder, done = cold
    assert "hush" not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"hush" not in path.read_bytes(), path


def test_a_cached_run_starts_and_imports_nothing_heavy(garden: Path, tmp_path: Path) -> None:
    """Imports that are forbidden on the cached path raise; so do sub-processes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'mlflow', 'matplotlib', 'deepspeed', 'transformers'):\n"
        "            raise RuntimeError('a cached run imports ' + name)\n"
        "sys.meta_path.insert(0, Guard())\n"
        "def guard(event, arguments):\n"
        "    if event == 'subprocess.Popen':\n"
        "        raise RuntimeError('a cached run starts ' + str(arguments[0]))\n"
        "sys.addaudithook(guard)\n"
    )
    done = goldcrest(
        "run", GARDEN, "--store", str(garden), "--json", "-", "-o", "grow.hub_token=hush",
        cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT), str(TOYS)]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # `-`: nothing but JSON on the standard output
    assert {step["state"] for step in result["steps"]} == {"cached"}
    assert result["metrics"]["harvest"] == 4.5
    assert Path(result["report"]).is_file()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom goldcrest.pipelines import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'mlflow', 'matplotlib', 'ray', 'numpy', 'pyarrow', 'jinja2')\n"
        "print('HEAVY', [m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "artifacts" in done.stdout


def test_a_run_that_fails_and_is_resumed(garden: Path, tmp_path: Path) -> None:
    """A step's error: exit 1, its words, siblings' results kept; `resume` repeats the same run."""
    failed = goldcrest(
        "run", GARDEN, "--store", str(garden), "--json", "bad.json", "--run-id", "bad",
        "-o", "grow.fail=input", "--no-tracking", cwd=tmp_path,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "the soil is too <b>dry</b>" in failed.stderr
    assert "water it" in failed.stderr
    result = json.loads((tmp_path / "bad.json").read_text())
    assert result["status"] == "failed"
    assert result["error"]["step"] == "grow"
    states = {step["name"]: step["state"] for step in result["steps"]}
    assert states == {"sow": "cached", "grow": "failed", "prune": "skipped", "weigh": "skipped"}
    report = (garden / "runs" / "bad" / "report.html").read_text()
    assert "too &lt;b&gt;dry&lt;/b&gt;" in report
    assert not (garden / "runs" / "bad" / "tracking.log").exists()
    # The cause is mended (here: in the record), and the run goes on under its name.
    record = garden / "runs" / "bad" / "run.json"
    record.write_text(record.read_text().replace('"fail": "input"', '"fail": ""'))
    resumed = goldcrest(
        "resume", "bad", "--store", str(garden), "--json", "good.json", "--no-tracking",
        cwd=tmp_path,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads((tmp_path / "good.json").read_text())
    assert result["run"] == "bad"
    assert result["status"] == "succeeded"


# ---------------------------------------------------------------- bad input: exit 2, nothing done


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "spaker"], "there is no pipeline 'spaker'"),
        (["run", "toys.nothing"], "there is no module 'toys.nothing'"),
        (["run", "json.tool"], "module 'json.tool' is no pipeline"),
        (["run", "../garden"], "there is no pipeline '../garden'"),
        (["run", GARDEN, "-o", "grow.watr=1"], "did you mean 'grow.water'?"),
        (["run", GARDEN, "-o", "grow.water=wet"], "'grow.water' should be a valid number"),
        (["run", GARDEN, "--config", "tiny"], "there is no config 'tiny'"),
        (["run", GARDEN, "--profile", "moon"], "there is no profile 'moon'"),
        (["run", GARDEN, "--run-id", "../up"], "is not the name of a run"),
        (["run", GARDEN, "--corpus", "/no/such/corpus"], "/no/such/corpus"),
        (["plan", GARDEN, "-o", "seed=-1"], "'seed' should be greater than or equal to 0"),
        (["resume", "nothing"], "has no run 'nothing' (it has none yet)"),
        (["report", "../../etc/passwd"], "is not the name of a run"),
        (["artifacts", "show", "deadbeef"], "the store has no artifact 'deadbeef'"),
        (["artifacts", "gc", "--older-than", "soon"], "'soon' is not a duration"),
        (["config", "show", GARDEN, "-o", "x"], "is not an override"),
    ],
)
def test_bad_input(call: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = call(*arguments, "--json", "answer.json")
    assert done.code == 2
    assert said in done.err
    assert done.err.startswith("error: ")
    assert said in json.loads((tmp_path / "answer.json").read_text())["error"]["message"]
    assert "ray" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "arguments", [["run"], ["fly"], ["run", GARDEN, "--colour"], ["plan", GARDEN, "--format", "x"]]
)
def test_wrong_usage(call: Any, arguments: list[str]) -> None:
    assert call(*arguments).code == 2


def test_bad_input_of_a_run_has_the_form_of_a_result(call: Any, tmp_path: Path) -> None:
    call("run", GARDEN, "-o", "grow.watr=1", "--json", "answer.json")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["status"] == "failed"
    assert answer["pipeline"] == GARDEN
    assert answer["steps"] == []
    assert answer["error"]["step"] is None


def test_a_json_file_that_cannot_be_written_is_refused_first(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("run", GARDEN, "--json", "file/answer.json")
    assert done.code == 2
    assert "cannot be written" in done.err
    assert not (tmp_path / ".goldcrest").exists()


def test_an_interrupt_is_130(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from goldcrest.pipelines import cli_run

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "execute", interrupted)
    done = call("run", GARDEN, "--json", "answer.json")
    assert done.code == 130
    assert "the same command continues" in done.err
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["status"] == "failed"
    message = "interrupted; the same command continues where it stopped"
    assert answer["error"] == {"step": None, "message": message, "hint": None}


def test_an_unexpected_error_still_answers_machines(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from goldcrest.pipelines import cli_run

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("at s3://k:hush@b")

    monkeypatch.setattr(cli_run, "execute", broken)
    done = call("run", GARDEN, "--json", "answer.json")
    assert done.code == 1
    assert "hush" not in done.err
    error = json.loads((tmp_path / "answer.json").read_text())["error"]
    assert error["message"] == "unexpected ZeroDivisionError: at s3://***@b"


def test_a_store_that_cannot_be_used_is_1(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = call("artifacts", "ls", "--store", "file")
    assert done.code == 1
    assert "file" in done.err


# ---------------------------------------------------------------------------- plan and config


def test_plan_says_what_runs_and_why(call: Any, garden: Path) -> None:
    keep = ["--store", str(garden), "-o", "grow.hub_token=hush"]
    done = call("plan", GARDEN, *keep, "-o", "grow.water=2", "--json", "plan.json")
    assert done.code == 0
    assert "config `water` changed 0.5 -> 2.0" in done.out
    assert "3 of 4 steps will run" in done.out
    states = [step["state"] for step in json.loads(Path("plan.json").read_text())["steps"]]
    assert states == ["cached", "run", "run", "run"]
    assert call("plan", GARDEN, *keep, "--format", "mermaid").out.startswith("flowchart")
    machine = json.loads(call("plan", GARDEN, *keep, "--format", "json").out)
    assert machine["pipeline"] == "garden"


def test_corpora_become_config_fields(call: Any, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    done = call(
        "config", "show", GARDEN, "--corpus", "one", "--corpus", "two", "--eval-corpus", "three",
        "--json", "config.json",
    )  # fmt: skip
    assert done.code == 0
    corpus = json.loads(Path("config.json").read_text())["corpus"]
    assert corpus["paths"] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert corpus["eval_paths"] == [str(tmp_path / "three")]


def test_config_show_reads_back_and_masks(call: Any, tmp_path: Path) -> None:
    done = call("config", "show", GARDEN, "-o", "grow.water=2", "-o", "grow.hub_token=hush")
    assert "hush" not in done.out
    (tmp_path / "again.yaml").write_text(done.out.replace("'***'", "''"))
    again = call("config", "diff", GARDEN, "again.yaml", "--json", "diff.json")
    assert again.code == 0
    rows = json.loads(Path("diff.json").read_text())
    assert rows == [{"field": "grow.water", "left": 0.5, "right": 2.0}]


def test_configs_are_found_by_name(call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "garden"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("grow: {epochs: 1}\n")
    (folder / "base.yaml").write_text("grow: {epochs: 50}\n")
    done = call("config", "diff", GARDEN, "tiny", "base", "--json", "-")
    assert json.loads(done.out) == [{"field": "grow.epochs", "left": 1, "right": 50}]
    assert "did you mean 'tiny'?" in call("config", "show", GARDEN, "-c", "tny").err


def test_config_schema(call: Any) -> None:
    done = call("config", "schema", GARDEN, "--json", "schema.json")
    assert "litres per day" in done.out
    assert "grow.water" in done.out
    schema = json.loads(Path("schema.json").read_text())
    assert schema["properties"]["seed"]["minimum"] == 0


# ------------------------------------------------------------------------- artifacts and runs


def test_artifacts_ls_show_lineage(call: Any, garden: Path) -> None:
    store = ["--store", str(garden)]
    done = call("artifacts", "ls", *store, "--json", "ls.json")
    rows = json.loads(Path("ls.json").read_text())
    assert {row["step"] for row in rows} == {"sow", "grow", "prune", "weigh"}
    assert "4 artifacts" in done.out
    key = next(row["key"] for row in rows if row["step"] == "grow")
    for name in (key, key[:10], "grow"):
        shown = json.loads(call("artifacts", "show", name, *store, "--json", "-").out)
        assert shown["key"] == key
        assert (Path(shown["path"]) / "bundle.json").is_file()
    assert call("artifacts", "ls", "--step", "sow", *store).out.count("sow") == 1
    tree = call("artifacts", "lineage", "weigh", *store, "--json", "tree.json").out
    assert "pruned = prune" in tree
    lineage = json.loads(Path("tree.json").read_text())
    assert lineage["inputs"]["plants"]["inputs"]["seeds"]["step"] == "sow"


def test_a_store_inside_a_job_s_own_folder_is_warned_of(
    call: Any, garden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit` unpacks the working tree below Ray's temporary files."""
    cached = ["run", GARDEN, "-o", "grow.hub_token=hush", "--no-tracking", "--store", "store"]
    assert "which Ray removes" not in call(*cached).err
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    done = call(*cached)
    assert done.code == 0
    assert "which Ray removes" in done.err


def test_artifacts_verify_finds_a_flipped_bit(call: Any, garden: Path) -> None:
    store = ["--store", str(garden)]
    assert call("artifacts", "verify", *store).code == 0
    (victim,) = garden.glob("artifacts/*/*/seeds.json")
    victim.chmod(0o644)
    victim.write_text(victim.read_text().replace("2", "3"))
    done = call("artifacts", "verify", *store, "--json", "verify.json")
    assert done.code == 1
    problems = json.loads(Path("verify.json").read_text())["problems"]
    assert [problem["step"] for problem in problems] == ["sow"]


def test_artifacts_gc_keeps_what_runs_use(call: Any, garden: Path) -> None:
    """Only with --older-than do artifacts go, and only those that no kept run names."""
    store = ["--store", str(garden)]

    def count() -> int:
        return sum(1 for _ in Store.open(garden).entries())

    assert call("artifacts", "gc", *store).code == 0
    assert call("artifacts", "gc", "--older-than", "0s", *store).code == 0
    assert count() == 4
    done = call("artifacts", "gc", "--older-than", "0s", "--keep-runs", "0", "--dry-run", *store)
    assert "would be freed" in done.out
    assert count() == 4
    again = ["artifacts", "gc", "--older-than", "0s", "--keep-runs", "0", *store]
    assert call(*again, "--keep-run", "first").code == 0
    assert count() == 4
    assert call(*again).code == 0
    assert count() == 0


def test_runs_of_other_hosts_count_where_the_store_is_a_bucket(
    call: Any, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their artifacts are kept, and their runs can be reported and resumed from here."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "one-host"))
    there = Store.open(s3_uri)
    kept, loose = "a" * 64, "b" * 64
    for key in (kept, loose):
        with there.lease(key, owner="test") as lease:
            there.commit(key, there.begin(key, lease), {"step": "sow"}, lease)
    folder = there.run_folder("theirs")
    (folder / "run.json").write_text(json.dumps({"plan": {"steps": [{"key": kept}]}}))
    (folder / "events.jsonl").write_text("")
    there.publish_run("theirs")

    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another-host"))
    here = Store.open(s3_uri)
    for keep in (["--keep-runs", "1"], ["--keep-runs", "0", "--keep-run", "theirs"]):
        done = call("artifacts", "gc", "--older-than", "0s", *keep, "--store", s3_uri)
        assert done.code == 0, done.err
        assert [entry["key"] for entry in here.entries()] == [kept]
    assert "theirs" in call("report", "last", "--store", s3_uri).out
    assert "not complete" in call("resume", "theirs", "--store", s3_uri).err  # found, but a stub
    assert "newest: theirs" in call("resume", "nobodys", "--store", s3_uri).err
    call("artifacts", "gc", "--older-than", "0s", "--keep-runs", "0", "--store", s3_uri)
    assert list(here.entries()) == []


def test_report_is_written_again(call: Any, garden: Path) -> None:
    store = ["--store", str(garden)]
    path = garden / "runs" / "first" / "report.html"
    first = path.read_text()
    path.unlink()
    assert call("report", "last", *store).out.strip() == str(path)
    assert path.read_text() == first
    assert call("report", "first", "--output", "mine.html", *store).code == 0
    assert Path("mine.html").read_text() == first
    assert "did you mean 'first'?" in call("report", "frist", *store).err


def test_a_record_without_its_secret_cannot_be_resumed(call: Any, garden: Path) -> None:
    done = call("resume", "first", "--store", str(garden))
    assert done.code == 2
    assert "keeps no secrets, and grow.hub_token is one" in done.err


def test_the_store_comes_from_the_environment(
    call: Any, garden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLDCREST_STORE", str(garden))
    assert "4 artifacts" in call("artifacts", "ls").out


# -------------------------------------------------------------------------- list, doctor, version


def test_list_finds_methods_by_file(call: Any) -> None:
    done = call("list", "--json", "list.json")
    answer = json.loads(Path("list.json").read_text())
    assert {"ahc", "cimc", "kmeans"} <= set(answer["methods"]["clustering"])
    assert "laptop" in answer["profiles"]
    assert "clustering" in done.out


def test_version(call: Any) -> None:
    import goldcrest

    done = call("version", "--json", "version.json")
    assert done.out.strip() == goldcrest.__version__
    assert json.loads(Path("version.json").read_text())["goldcrest"] == goldcrest.__version__


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_exit_code(call: Any, monkeypatch: pytest.MonkeyPatch, ok: bool, code: int) -> None:
    from goldcrest.cluster import doctor

    check = {"name": "ray", "status": "ok" if ok else "failure", "detail": "d", "hint": "h"}
    monkeypatch.setattr(doctor, "diagnose", lambda **_: {"ok": ok, "checks": [check]})
    done = call("doctor", "--json", "doctor.json")
    assert done.code == code
    assert json.loads(Path("doctor.json").read_text())["ok"] is ok


def test_of_a_wide_table_the_intervals_are_left_to_the_report() -> None:
    from goldcrest.pipelines.cli_run import _columns_shown

    narrow = ["eer", "eer_ci", "trials"]
    wide = [name for metric in "abcdef" for name in (metric, f"{metric}_ci")]
    assert _columns_shown(narrow) == [0, 1, 2]
    assert [wide[place] for place in _columns_shown(wide)] == list("abcdef")

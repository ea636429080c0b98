"""`goldcrest submit|status|logs|stop`, and plain `ray job submit`, on a real cluster.

The working tree that is sent is a copy of this one with a pipeline of the user's own beside it; the
pipeline writes down where the code that ran it lay.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.store import Store
from goldcrest.pipelines import cli
from goldcrest.pipelines.cli_jobs import is_loopback, job_store
from tests.cluster.dashboard_cluster import DashboardCluster, user_environment

ROOT = Path(__file__).parents[2]
PIPELINE = '''
"""One step that writes down where its code lies."""

import goldcrest
from goldcrest.cluster.api import Artifact, Config as Base, Output, task


class SayConfig(Base):
    """What to say."""

    word: str = "hello"
    hub_token: str = ""


class Config(Base):
    """The whole."""

    say: SayConfig = SayConfig()


@task(cpus=0.5)
def say(cfg: SayConfig, out: Output) -> None:
    """Write down the word and the place of the package."""
    if cfg.word == "fail":
        raise ValueError("asked to")
    out.json("said", {"word": cfg.word, "code": goldcrest.__file__})


def build(cfg):
    return say.bind(cfg.say)
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working tree: goldcrest's own folders, a pipeline, a config, and a large file."""
    folder = tmp_path_factory.mktemp("work") / "tree"
    for name in ("goldcrest", "cluster", "kernels", "pipelines", "tasks"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    (folder / "lab").mkdir()
    (folder / "lab" / "saying.py").write_text(PIPELINE)
    (folder / "loud.yaml").write_text("say: {word: it's $HOME}\n")
    return folder


@pytest.fixture(scope="module")
def submitted(
    job_cluster: DashboardCluster, tree: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store, and what a submission that was waited for said."""
    store = tree.parent / "store"
    done = goldcrest(
        tree, "submit", "lab.saying", "-c", "loud.yaml", "--store", str(store), "--run-id", "loud",
        "--address", job_cluster.dashboard, "--json", "../loud.json",
    )  # fmt: skip
    return store, done


def goldcrest(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user of `tree` calls it."""
    return subprocess.run(
        [sys.executable, "-m", "goldcrest", *arguments],
        cwd=cwd,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def said(store: Path) -> list[dict[str, str]]:
    """What the artifacts of the store say, newest last."""
    opened = Store.open(store)
    entries = sorted(opened.entries(), key=lambda entry: str(entry["created"]))
    found = [opened.find(entry["key"]) for entry in entries]
    return [artifact.json("said") for artifact in found if artifact is not None]


def test_submit_runs_the_working_tree_there(
    submitted: tuple[Path, subprocess.CompletedProcess[str]], tree: Path
) -> None:
    store, done = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = said(store)
    assert result["word"] == "it's $HOME"
    assert "working_dir_files" in result["code"]  # the package's copy, not an installed one
    answer = json.loads((tree.parent / "loud.json").read_text())
    assert (answer["job"], answer["status"], answer["exit_code"]) == ("loud", "SUCCEEDED", 0)
    assert answer["store"] == str(store)
    assert answer["package"]["files"] > 50
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"sending {answer['package']['files']} files, ")
    assert lines[1].startswith("largest: ")
    assert "saying succeeded in" in done.stdout  # the job's own log
    record = json.loads((store / "runs" / "loud" / "run.json").read_text())
    assert record["status"] == "succeeded"


def test_a_failed_job_gives_its_exit_code(
    submitted: tuple[Path, object], tree: Path, job_cluster: DashboardCluster
) -> None:
    """2: the run itself refuses its input there. Nothing but the exit code tells that from 1.

    Its files lie where a package has nothing of: in a store elsewhere, as a sweep's result does,
    and among build products. The job finds them all the same.
    """
    best = submitted[0].parent / "elsewhere" / "runs" / "s" / "best.yaml"
    for path, text in (
        (best, "say: {word: best}\n"),
        (tree / "build" / "profile.yaml", "steps: {say: {cpus: 99}}\n"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    done = goldcrest(
        tree, "submit", "lab.saying", "--store", str(submitted[0]), "--no-tracking",
        "--config", str(best), "--profile", "build/profile.yaml",
        "--address", job_cluster.dashboard,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "step 'say' asks for 99 CPU cores" in done.stdout
    assert "FAILED" in done.stdout


def test_plain_ray_job_submit_works_too(tree: Path, job_cluster: DashboardCluster) -> None:
    store = tree.parent / "plain"
    done = subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "goldcrest", "run",
         "lab.saying", "-o", "say.word=plain", "--store", str(store)],
        cwd=tree,
        env=user_environment(RAY_API_SERVER_ADDRESS=job_cluster.dashboard),
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = said(store)
    assert result["word"] == "plain"
    assert "working_dir_files" in result["code"]


def test_status_logs_and_stop(
    submitted: tuple[Path, object],
    job_cluster: DashboardCluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([*arguments, "--address", job_cluster.dashboard])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    file = tmp_path / "answer.json"
    code, text = call("status", "--json", str(file))
    assert code == 0
    assert "loud" in text and "SUCCEEDED" in text
    assert "loud" in [row["job"] for row in json.loads(file.read_text())]
    code, text = call("status", "loud", "--json", str(file))
    facts = json.loads(file.read_text())
    assert (facts["status"], facts["run"], facts["exit_code"]) == ("SUCCEEDED", "loud", 0)
    assert "python -m goldcrest run lab.saying --config loud.yaml" in facts["command"]
    assert "saying succeeded in" in call("logs", "loud")[1]
    assert call("logs", "loud", "-f")[0] == 0
    assert call("stop", "loud") == (0, "job loud: SUCCEEDED\n")
    code, text = call("logs", "nobody")
    assert code == 2 and "knows no job 'nobody'" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no pipeline 'nothing'"),
        (["lab.saying", "-o", "say.wrd=1"], "wrd"),
        (["lab.saying", "--run-id", "../up"], "is not the name of a run"),
        (["lab.saying", "--max-upload", "1kB"], "the largest: "),
        (["lab.saying", "--max-upload", "much"], "is not an amount"),
        (["lab.saying", "--env", "A"], "write it as NAME=VALUE"),
        (["lab.saying", "-c", "../nowhere.yaml"], "there is no config '../nowhere.yaml'"),
        (["lab.saying", "--address", "http://127.0.0.1:9"], "no Ray dashboard answers"),
        (["lab.saying", "--working-dir", "missing"], "is not a folder"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job_cluster: DashboardCluster,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.syspath_prepend(str(tree))
    with pytest.raises(SystemExit) as end:
        cli.main(["submit", "--address", job_cluster.dashboard, *arguments])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert words in said.err
    assert "submitted" not in said.out


def test_no_wait_says_how_to_follow_and_warns_of_secrets(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job_cluster: DashboardCluster,
) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.syspath_prepend(str(tree))
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["submit", "lab.saying", "-o", "say.hub_token=hush", "--no-wait", "--python",
             "no-such-python", "--store", "../never", "--run-id", "unwatched",
             "--address", job_cluster.dashboard]
        )  # fmt: skip
    said = capsys.readouterr()
    assert end.value.code == 0
    assert "can read say.hub_token" in said.err
    assert "goldcrest logs unwatched --follow" in said.out
    with pytest.raises(SystemExit) as end:
        cli.main(["logs", "unwatched", "-f", "--address", job_cluster.dashboard])
    assert end.value.code == 127  # the shell's word for a command that is not there
    assert "hush" not in capsys.readouterr().out


def test_a_job_elsewhere_must_be_told_where_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDCREST_STORE", raising=False)
    with pytest.raises(InputError, match="where its results go"):
        job_store(None, "http://head.example:8265")
    assert job_store("s3://lab/store", "http://head.example:8265") == "s3://lab/store"
    assert Path(job_store(None, "http://127.0.0.1:8265")).is_absolute()
    monkeypatch.setenv("GOLDCREST_STORE", "/nfs/store")
    assert job_store(None, "http://head.example:8265") == "/nfs/store"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("http://10.0.0.7:8265", False),
        ("https://127.0.0.1.example.org", False),
    ],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback

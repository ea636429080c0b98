"""`goldcrest sweep`: bad input starts nothing, one real command end to end, the shipped spaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster.config_file import read_yaml
from goldcrest.cluster.sweep_space import Space
from goldcrest.pipelines import cli
from goldcrest.pipelines.discovery import load_pipeline

TOYS = Path(__file__).parent
ROOT = TOYS.parents[1]
GARDEN = "toys.garden"
KEYS = {
    "sweep", "pipeline", "metric", "mode", "status", "seconds", "trials", "best", "executions",
    "best_config", "report", "error",
}  # fmt: skip


def write(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ("grow.water: {uniform: [0.1, 1]}", [], "how many trials"),
        ("grow.watr: {uniform: [0.1, 1]}", ["--trials", "2"], "did you mean 'grow.water'?"),
        ("grow.water: {uniform: [-1, 1]}", ["--trials", "2"], "'grow.water' at -1"),
        ("grow.water: {between: [0.1, 1]}", ["--trials", "2"], "there is no field 'between'"),
        ("grow.water: {uniform: [0.1, 1]}", ["--search", "grid"], "a grid needs lists"),
        ("grow.water: [", ["--trials", "2"], "line 1"),
        ("", ["--trials", "2"], "has no axes"),
        (
            "grow.water: {grid: [1]}",
            ["--trials", "2", "--watch", "mow.loss"],
            "there is no step 'mow'",
        ),
        ("grow.water: {grid: [1]}", ["--trials", "2", "--name", "../x"], "is not the name"),
        ("grow.water: {grid: [1]}", ["--trials", "2", "-o", "seed=-1"], "'seed' should be"),
        ("grow.water: {grid: [1]}", ["--trials", "2", "--corpus", "/no/corpus"], "/no/corpus"),
    ],
)
def test_bad_input_starts_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    space: str,
    more: list[str],
    said: str,
) -> None:
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOLDCREST_STORE", raising=False)
    given = ["sweep", GARDEN, "--space", write(tmp_path, space), "--metric", "harvest"]
    with pytest.raises(SystemExit) as end:
        cli.main([*given, *more, "--json", "answer.json"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert said in answer["error"]["message"]
    assert answer["trials"] == []
    assert answer["executions"] == {"ran": 0, "cached": 0}
    assert not list(tmp_path.rglob("trials.jsonl"))


def test_a_space_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", "speaker", "--space", "speaker-margins", "--metric", "x"])
    assert end.value.code == 2
    assert "did you mean 'speaker-margin'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = write(tmp_path, "grow.water: {grid: [0.5, 2.0, 1.0]}\n")
    environment: dict[str, Any] = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TOYS}",
    }
    environment.pop("GOLDCREST_STORE", None)
    done = subprocess.run(
        [
            sys.executable, "-m", "goldcrest", "sweep", GARDEN, "--space", space,
            "--search", "grid", "--metric", "harvest", "--mode", "max", "--parallel", "2",
            "--no-tracking", "--json", "answer.json", "-o", "grow.hub_token=hush",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert set(answer) == KEYS
    assert answer["best"]["config"] == {"grow.water": 2.0}
    # 3 days x litres x 3 seeds
    found = {t["config"]["grow.water"]: t["metric"] for t in answer["trials"]}
    assert found == {0.5: 4.5, 2.0: 18.0, 1.0: 9.0}
    assert {trial["state"] for trial in answer["trials"]} == {"succeeded"}
    assert answer["executions"] == {"ran": 10, "cached": 2}  # sow once, the other three each time
    assert "step executions: 10 ran, 2 saved" in done.stdout
    assert answer["best_config"] in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "hush" not in done.stdout + done.stderr
    assert "Trial" not in done.stderr  # Tune keeps its own words to itself
    assert read_yaml(Path(answer["best_config"]))["grow"] == {"water": 2.0}
    report_is_written_again(tmp_path, Path(answer["report"]), answer["sweep"], monkeypatch)


def report_is_written_again(
    folder: Path, report: Path, sweep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`goldcrest report SWEEP` makes the same page of the record alone."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GOLDCREST_STORE", raising=False)
    wanted = report.read_text("utf-8")
    report.unlink()
    with pytest.raises(SystemExit) as end:
        cli.main(["report", sweep])
    assert end.value.code == 0
    assert report.read_text("utf-8") == wanted
    (report.parent / "result.json").unlink()
    with pytest.raises(SystemExit) as end:
        cli.main(["report", sweep])
    assert end.value.code == 2


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_spaces_fit_the_shipped_configs(path: Path) -> None:
    pipeline = load_pipeline(path.stem.split("-")[0])  # a space is named after its pipeline
    space = Space.load(path)
    configs = sorted((ROOT / "configs" / pipeline.name).glob("*.yaml"))
    assert {"tiny", "base"} <= {config.stem for config in configs}
    for config in configs:
        space.check(pipeline.config_class, read_yaml(config), space.random_points(4, 0))

"""The speaker pipeline as a user runs it: command line, real Ray, real DeepSpeed, real MLflow."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tests.end_to_end.command_line import SmallRun, goldcrest

STEPS = ["corpus", "features", "ivectors", "cluster-kmeans", "cluster", "pretrain", "sparse"]


@pytest.fixture(scope="module")
def first(small_run: SmallRun) -> SmallRun:
    """The run that all look at."""
    return small_run


def test_the_json_is_what_the_readers_were_promised(first: SmallRun) -> None:
    result = first.json
    assert {"run", "pipeline", "status", "seconds", "steps", "metrics", "bundles", "report"} <= set(
        result
    )
    assert (result["pipeline"], result["status"], result["error"]) == ("speaker", "succeeded", None)
    assert result["quarantined"] == 0
    assert {step["state"] for step in result["steps"]} == {"ran"}
    assert set(STEPS) <= {step["name"] for step in result["steps"]}
    for step in result["steps"]:
        assert {"name", "key", "state", "seconds", "reason"} <= set(step)
    assert {"acc", "nmi", "ami", "purity"} <= set(result["metrics"]["clustering"]["cimc"])
    systems = {"meanstd", "ivector", "dense", "fusion", "sparse", "int8"}
    assert set(result["metrics"]["verification"]) == systems
    for found in result["metrics"]["verification"].values():
        assert {"eer", "min_dcf_0.01", "min_dcf_0.05", "trials", "eer_ci"} <= set(found)
    for found in result["metrics"]["models"].values():
        assert {"bytes", "parameters", "sparsity", "rtf", "latency_ms_p50"} <= set(found)


def test_three_bundles_and_a_report_are_there(first: SmallRun) -> None:
    folder, result = first.folder, first.json
    assert set(result["bundles"]) == {"dense", "sparse", "int8"}
    for path in result["bundles"].values():
        for member in ("bundle.json", "model.safetensors", "MODEL_CARD.md", "manifest.json"):
            assert (folder / path / member).is_file()
    report = (folder / result["report"]).read_text()
    assert "<html" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_no_colour_codes_outside_a_terminal(first: SmallRun) -> None:
    assert "\x1b[" not in first.stdout


def test_mlflow_has_the_run_and_its_steps(first: SmallRun) -> None:
    (database,) = (first.folder / "store").rglob("*.db")
    with sqlite3.connect(database) as connection:
        names = {row[0] for row in connection.execute("select name from runs")}
        metrics = {row[0] for row in connection.execute("select distinct key from metrics")}
    assert set(STEPS) <= names
    assert any("eer" in name for name in metrics)


def test_the_same_command_again_is_cached_and_starts_no_ray(first: SmallRun) -> None:
    folder = first.folder
    goldcrest(
        *("run", "speaker", "--config", "small.yaml", "--store", "store", "--json", "again.json"),
        cwd=folder,
    )
    again = json.loads((folder / "again.json").read_text())
    assert {step["state"] for step in again["steps"]} == {"cached"}
    assert again["bundles"] == first.json["bundles"]
    assert again["metrics"] == first.json["metrics"]


def test_the_plan_says_what_a_change_would_run_and_why(first: SmallRun) -> None:
    done = goldcrest(
        *("plan", "speaker", "--config", "small.yaml", "--store", "store"),
        *("-o", "sparse.sparsity=0.8"),
        cwd=first.folder,
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "cached" in lines["pretrain"]
    assert "0.75" in lines["sparse"]
    assert "0.8" in lines["sparse"]


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_step_made_again(first: SmallRun) -> None:
    folder = first.folder
    goldcrest("artifacts", "verify", "--store", "store", cwd=folder)
    weights = folder / first.json["bundles"]["int8"] / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    goldcrest("artifacts", "verify", "--store", "store", cwd=folder, expect=1)
    goldcrest(
        *("run", "speaker", "--config", "small.yaml", "--store", "store", "--json", "mended.json"),
        cwd=folder,
    )
    mended = json.loads((folder / "mended.json").read_text())
    assert {step["name"]: step["state"] for step in mended["steps"]}["bundle-int8"] == "ran"
    assert weights.read_bytes() == good
    goldcrest("artifacts", "verify", "--store", "store", cwd=folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "ivector.gaussians=9"], "gaussians"),
        (["-o", "clustering.method=cimk"], "cimc"),
        (["-o", "seed=soon"], "seed"),
        (["--corpus", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_starts_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = goldcrest("run", "speaker", "--store", "store", *arguments, cwd=tmp_path, expect=2)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "store").rglob("manifest.json"))

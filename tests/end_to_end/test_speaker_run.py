"""The speaker pipeline as a user runs it: command line, real Ray, real DeepSpeed, real MLflow."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["corpus", "features", "ivectors", "cluster-kmeans", "cluster", "pretrain", "sparse"]
SMALL = {
    "corpus": {"embedded": {"speakers": 8, "utterances": 3}, "eval_share": 0.5},
    "features": {"deltas": 0, "normalisation": "none", "fbank": {"mel_bins": 24}},
    "ivector": {
        "covariance": "diagonal",
        "diagonal": {"gaussians": 8, "iterations": 4},
        "ubm_passes": 1,
        "statistics": {"scale": 0.1, "second_order": "diagonal", "selected": 4},
        "model": {"dimensions": 6, "iterations": 2, "minimum_count": 1.0},
    },
    "clustering": {
        "method": "cimc",
        "clusters": 4,
        "settings": {"hidden": [16]},
        "training": {"epochs": 2, "batch_size": 12, "optimizer": "sgd"},
    },
    "candidates": {"changes": [{}, {"mu": 1.5}], "reference": {"method": "kmeans"}},
    "compare": [{"method": "kmeans", "clusters": 4}],
    "pretrain": {
        "crop_frames": [40, 60],
        "min_cluster": 1,
        "network": {
            "channels": 16,
            "mfa_channels": 24,
            "attention_channels": 8,
            "se_channels": 8,
            "embedding_dim": 12,
        },
        "training": {"epochs": 1, "batch_size": 8},
    },
    "sparse": {
        "crop_frames": [40, 60],
        "min_cluster": 1,
        "sparsity": 0.7,
        "calibration": 8,
        "training": {"epochs": 1, "batch_size": 8},
    },
    "quantize": {"calibration": 8},
    "evaluate": {"bootstrap": 20, "timed_utterances": 3},
}


def goldcrest(*arguments: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "goldcrest", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole run; its folder, its JSON, its output."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(json.dumps(SMALL))  # JSON is YAML
    done = goldcrest(
        *("run", "speaker", "--config", "small.yaml", "--store", "store", "--json", "run.json"),
        cwd=folder,
    )
    result = json.loads((folder / "run.json").read_text())
    return {"folder": folder, "json": result, "stdout": done.stdout}


def test_the_json_is_what_the_readers_were_promised(first: dict[str, Any]) -> None:
    result = first["json"]
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


def test_three_bundles_and_a_report_are_there(first: dict[str, Any]) -> None:
    folder, result = first["folder"], first["json"]
    assert set(result["bundles"]) == {"dense", "sparse", "int8"}
    for path in result["bundles"].values():
        for member in ("bundle.json", "model.safetensors", "MODEL_CARD.md", "manifest.json"):
            assert (folder / path / member).is_file()
    report = (folder / result["report"]).read_text()
    assert "<html" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_no_colour_codes_outside_a_terminal(first: dict[str, Any]) -> None:
    assert "\x1b[" not in first["stdout"]


def test_mlflow_has_the_run_and_its_steps(first: dict[str, Any]) -> None:
    (database,) = (first["folder"] / "store").rglob("*.db")
    with sqlite3.connect(database) as connection:
        names = {row[0] for row in connection.execute("select name from runs")}
        metrics = {row[0] for row in connection.execute("select distinct key from metrics")}
    assert set(STEPS) <= names
    assert any("eer" in name for name in metrics)


def test_the_same_command_again_is_cached_and_starts_no_ray(first: dict[str, Any]) -> None:
    folder = first["folder"]
    goldcrest(
        *("run", "speaker", "--config", "small.yaml", "--store", "store", "--json", "again.json"),
        cwd=folder,
    )
    again = json.loads((folder / "again.json").read_text())
    assert {step["state"] for step in again["steps"]} == {"cached"}
    assert again["bundles"] == first["json"]["bundles"]
    assert again["metrics"] == first["json"]["metrics"]


def test_the_plan_says_what_a_change_would_run_and_why(first: dict[str, Any]) -> None:
    done = goldcrest(
        *("plan", "speaker", "--config", "small.yaml", "--store", "store"),
        *("-o", "sparse.sparsity=0.8"),
        cwd=first["folder"],
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "cached" in lines["pretrain"]
    assert "0.7" in lines["sparse"]
    assert "0.8" in lines["sparse"]


def test_a_flipped_bit_is_found_and_the_step_made_again(first: dict[str, Any]) -> None:
    folder = first["folder"]
    goldcrest("artifacts", "verify", "--store", "store", cwd=folder)
    weights = folder / first["json"]["bundles"]["int8"] / "model.safetensors"
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

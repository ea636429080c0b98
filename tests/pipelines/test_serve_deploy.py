"""The Serve config of `goldcrest serve --write-config` on a cluster: deployed, swapped, asked."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from goldcrest.pipelines import cli
from tests.cluster.dashboard_cluster import DashboardCluster, dashboard_cluster, free_ports
from tests.cluster.dashboard_cluster import user_environment as environment
from tests.pipelines.speaker_server import make_bundle, voice

SECONDS = 240.0  # until a deployment answers, on a busy machine


@pytest.fixture
def cluster() -> Iterator[DashboardCluster]:
    """A cluster for Serve alone: what is deployed stays until the cluster ends."""
    with dashboard_cluster(cpus=4) as started:
        yield started


def deploy(config: Path, cluster: DashboardCluster) -> None:
    """What a user types: `serve deploy FILE`."""
    done = subprocess.run(
        [Path(sys.executable).parent / "serve", "deploy", config, "-a", cluster.dashboard],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def fingerprints(url: str) -> list[str]:
    """The served models, none before there is an answer."""
    try:
        answer = requests.get(f"{url}/models", timeout=10)
    except requests.ConnectionError:
        return []
    return [m["fingerprint"] for m in answer.json()["models"]] if answer.ok else []


def wait_for_models(url: str, unlike: list[str]) -> list[str]:
    """The models as soon as they are others than `unlike`."""
    limit = time.monotonic() + SECONDS
    while (found := fingerprints(url)) in ([], unlike):
        assert time.monotonic() < limit, found
        time.sleep(0.5)
    return found


@pytest.mark.slow
def test_a_written_config_is_deployed_and_swapped(
    cluster: DashboardCluster, tmp_path: Path, capsys: Any
) -> None:
    first, second = make_bundle(tmp_path / "1"), make_bundle(tmp_path / "2", seed=7)
    config, (port,) = tmp_path / "serve.yaml", free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(SystemExit) as end:
        cli.main([
            "serve", f"voice={first}", "--port", str(port), "--write-config", str(config),
            "-o", f"state_folder={tmp_path / 'state'}",
        ])  # fmt: skip
    assert not end.value.code, capsys.readouterr()
    deploy(config, cluster)
    before = wait_for_models(url, [])
    audio = {"audio": voice(100)}
    enrolled = requests.post(f"{url}/enroll", files=audio, data={"speaker": "anna"}, timeout=60)
    assert enrolled.ok, enrolled.text
    verified = requests.post(f"{url}/verify", files=audio, data={"speaker": "anna"}, timeout=60)
    assert verified.json()["score"] == pytest.approx(1.0, abs=1e-4)

    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    for deployment in tree["applications"][0]["deployments"]:
        deployment["user_config"]["bundles"] = {"voice": str(second)}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    deploy(config, cluster)
    assert wait_for_models(url, before) != before
    other = requests.post(f"{url}/verify", files=audio, data={"speaker": "anna"}, timeout=60)
    assert other.status_code == 409  # enrolled with the model that was

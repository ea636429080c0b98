"""Strangers at a cluster: refused, and nothing of theirs runs; the doctor sees an open door."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster import doctor_ray
from goldcrest.cluster.jobs import Jobs
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.ray_session import attach
from tests.cluster.dashboard_cluster import DashboardCluster

PYTHON = sys.executable


def submission(dashboard: str, marker: Path, token: str | None) -> int:
    """HTTP status of a bare request that asks for a command to be run."""
    body = {"entrypoint": f"touch {marker}", "submission_id": f"test-{uuid.uuid4().hex}"}
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(
        f"{dashboard}/api/jobs/", data=json.dumps(body).encode(), headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.scenario("a job is submitted without a token, or with a wrong one")
def test_a_stranger_is_refused_and_the_command_does_not_run(
    job_cluster: DashboardCluster, tmp_path: Path, record_property: Any
) -> None:
    record_property("tried", 2)
    jobs = Jobs(job_cluster.dashboard)
    from ray._raylet import AuthenticationTokenLoader

    assert submission(job_cluster.dashboard, tmp_path / "no-token", None) == 401
    assert submission(job_cluster.dashboard, tmp_path / "wrong-token", "0" * 64) == 403
    token = AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
    assert submission(job_cluster.dashboard, tmp_path / "right-token", token) == 200
    limit = time.monotonic() + 60
    while not (tmp_path / "right-token").exists():  # by then the others would have run too
        assert time.monotonic() < limit
        time.sleep(0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right-token"]
    assert not [job for job in jobs.all() if "-token" in job.command and "right" not in job.command]


OWN_RAY = """
import json, sys
import psutil
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.ray_session import attach, leave
ray = {"num_cpus": 1, "object_store_memory": "100MB", "dashboard": True}
mode = attach(Profile.model_validate({"ray": ray}))
from ray._private.worker import get_dashboard_url
print(json.dumps([mode, get_dashboard_url()]), flush=True)
sys.stdin.read()
killed = []
kill = psutil.Process.kill
def kill_and_note(process):
    killed.append(" ".join(process.cmdline()))
    kill(process)
psutil.Process.kill = kill_and_note
leave(mode)
print(json.dumps([killed, [child.name() for child in psutil.Process().children()]]))
"""


@pytest.mark.scenario("a job is submitted to a Ray that a run started, without its token")
def test_a_ray_that_a_run_started_refuses_strangers_and_leaves_nothing(
    tmp_path: Path, record_property: Any
) -> None:
    """A user who never heard of tokens: no variable is set, and the home is new. Of the processes
    of a Ray that was started the autoscaler is the only one that has to be killed."""
    record_property("tried", 2)
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    home, marks = tmp_path / "home", tmp_path / "marks"
    home.mkdir()
    marks.mkdir()
    with subprocess.Popen(
        [PYTHON, "-c", OWN_RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=kept | {"HOME": str(home)},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1][-3000:]
        mode, dashboard = json.loads(line)
        assert mode == "started"
        url = f"http://{dashboard}"
        assert submission(url, marks / "no-token", None) == 401
        assert submission(url, marks / "wrong-token", "0" * 64) == 403
        token = (home / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
        # Let in: a Ray of one run has no agent that would run the job, so 500 is an answer too.
        assert submission(url, marks / "right-token", token) in (200, 500)
        time.sleep(3)  # for what should not run
        rest, complaints = process.communicate(timeout=60)
        assert process.returncode == 0, complaints[-3000:]
    killed, living = json.loads(rest.splitlines()[-1])
    assert ["monitor.py" in command for command in killed] == [True], killed
    assert living == []
    assert {path.name for path in marks.iterdir()} <= {"right-token"}


def test_a_client_without_a_token_gets_a_sentence(job_cluster: DashboardCluster) -> None:
    program = (
        "import sys\nfrom goldcrest.cluster.errors import GoldcrestError\n"
        "from goldcrest.cluster.jobs import Jobs\n"
        "try:\n    Jobs(sys.argv[1]).all()\n"
        "except GoldcrestError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [PYTHON, "-c", program, job_cluster.dashboard],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "refused the request" in done.stdout, done.stderr
    assert "~/.ray/auth_token" in done.stdout


def test_the_doctor_knocks_at_a_real_dashboard(job_cluster: DashboardCluster) -> None:
    check = doctor_ray.check_ray(job_cluster.dashboard)
    assert check.status == "ok"
    assert check.detail.endswith("strangers are turned away (token)")
    assert doctor_ray.check_ray("http://127.0.0.1:9").status == "failure"


@pytest.fixture
def open_door() -> Iterator[str]:
    """Answers as the dashboard of an open Ray does; a real one would open this machine."""

    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/jobs/" else 404)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_open_dashboard_is_a_loud_failure(open_door: str) -> None:
    check = doctor_ray.check_ray(open_door)
    assert check.status == "failure"
    assert "runs anybody's code" in check.detail
    assert "RAY_AUTH_MODE=token" in check.hint


def test_a_ray_of_ours_asks_for_a_token_and_says_so_where_it_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from goldcrest.cluster import ray_session

    started: list[object] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ray_session, "_start", lambda arguments, tries: started.append(arguments))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    attach(Profile())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    attach(Profile())
    assert "can run code as this user" in capsys.readouterr().err
    assert len(started) == 2

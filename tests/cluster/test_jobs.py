"""Jobs on a real cluster: exit codes, logs, stop, strangers. One cluster for the session."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.job_package import Package, collect
from goldcrest.cluster.jobs import Job, Jobs, _Once, exit_code
from tests.cluster.dashboard_cluster import DashboardCluster

PYTHON = sys.executable


@pytest.fixture(scope="module")
def jobs(job_cluster: DashboardCluster) -> Jobs:
    return Jobs(job_cluster.dashboard)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "said.txt").write_text("from the package\n")
    return collect(folder)


def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def test_a_job_runs_in_its_package_and_ends_with_its_own_code(jobs: Jobs, package: Package) -> None:
    code = """
import os, sys
print(open("deep/said.txt").read(), os.environ["MOOD"], "it's $HOME")
sys.exit(7)
"""
    job, said = name(), []
    packed = jobs.submit(
        [PYTHON, "-c", code], package, job=job, environment={"MOOD": "a b"}, facts={"run": job}
    )
    ended = jobs.follow(job, said.append)
    assert packed > 0
    assert "from the package\n a b it's $HOME" in "".join(said)
    assert (ended.state, ended.exit_code, exit_code(ended)) == ("FAILED", 7, 7)
    assert ended.facts["run"] == job
    assert "".join(said) == jobs.logs(job)
    assert job in [each.id for each in jobs.all()]
    with pytest.raises(InputError, match="has had a job"):
        jobs.submit([PYTHON, "-V"], package, job=job)


def test_a_stopped_job_ends_as_after_ctrl_c(jobs: Jobs, package: Package) -> None:
    code = """
import signal, time
# Ours heeds it too where a shell in the background has had it ignored (heed_the_stop_signal).
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("put away")
"""
    job, said = name(), []
    jobs.submit([PYTHON, "-c", code], package, job=job)
    follower = threading.Thread(target=jobs.follow, args=(job, said.append))
    follower.start()
    limit = time.monotonic() + 60
    while "begun\n" not in "".join(said):
        assert time.monotonic() < limit
        time.sleep(0.1)
    ended = jobs.stop(job)
    follower.join(60)
    assert ended.state == "STOPPED"
    assert exit_code(ended) == 130
    assert "".join(said).endswith("begun\nput away\n")


@pytest.mark.parametrize("heeded", [True, False])
def test_a_job_heeds_the_stop_signal_that_a_background_shell_ignores(heeded: bool) -> None:
    code = """
import os, signal
from goldcrest.cluster.jobs import heed_the_stop_signal
heed_the_stop_signal()
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("ignored")
except KeyboardInterrupt:
    print("heeded")
"""
    environment = os.environ | ({"RAY_JOB_STOP_SIGNAL": "SIGINT"} if heeded else {})
    done = subprocess.run(
        [PYTHON, "-c", f"import signal\nsignal.signal(2, signal.SIG_IGN)\n{code}"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ("heeded\n" if heeded else "ignored\n")


def test_a_job_that_is_not_there(jobs: Jobs) -> None:
    for ask in (jobs.find, jobs.logs, jobs.stop):
        with pytest.raises(InputError, match="knows no job 'nobody'"):
            ask("nobody")


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no Ray dashboard answers"):
        Jobs("http://127.0.0.1:9")


def test_an_address_that_is_given_wins_over_the_environment(
    job_cluster: DashboardCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert Jobs(job_cluster.dashboard).address == job_cluster.dashboard
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", job_cluster.dashboard)
    assert Jobs().address == job_cluster.dashboard


@pytest.mark.parametrize(
    ("state", "code", "means"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(state: str, code: int | None, means: int) -> None:
    job = Job(
        id="x", state=state, exit_code=code, message="", command="", started=None, ended=None,
        facts={},
    )  # fmt: skip
    assert exit_code(job) == means


def test_a_log_that_comes_in_pieces_and_again_is_written_once() -> None:
    said: list[str] = []
    printer = _Once(said.append)
    printer("one\n", 0)
    printer("two\n", 4)
    printer("one\ntwo\nthr", 0)
    printer("three\n", 8)
    printer("one\ntwo\nthree\n", 0)
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_lost_connection_is_made_again(
    jobs: Jobs, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connection ends in the middle of the log, as when a forwarded port is cut."""
    job, said = name(), []
    jobs.submit([PYTHON, "-c", "print('first\\nsecond')"], package, job=job)
    real = jobs._client.tail_job_logs
    cut = []

    async def cut_once(wanted: str):  # type: ignore[no-untyped-def]
        async for text in real(wanted):
            yield text
            if not cut:
                cut.append(text)
                raise RuntimeError("WebSocket connection closed unexpectedly")

    monkeypatch.setattr(jobs._client, "tail_job_logs", cut_once)
    assert jobs.follow(job, said.append).state == "SUCCEEDED"
    assert "".join(said) == jobs.logs(job)


def test_what_ray_raises_becomes_a_sentence() -> None:
    from goldcrest.cluster.jobs import _told

    told = _told(
        RuntimeError("Request failed with status code 500: no agent\nmore"), "j", "http://h"
    )
    assert isinstance(told, GoldcrestError) and not isinstance(told, InputError)
    assert told.message.endswith("Request failed with status code 500: no agent")

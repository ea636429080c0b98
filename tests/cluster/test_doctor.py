"""The doctor: every check ends in a finding, whatever the machine is like."""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from goldcrest.cluster import doctor, doctor_finding, doctor_ray
from goldcrest.cluster.doctor import summary_lines
from goldcrest.cluster.doctor_finding import Check, finish, start_child


def test_this_machine_is_well_where_it_must_be(tmp_path: Path) -> None:
    """The suite itself needs these to be right."""
    for check in (doctor.check_python(), doctor.check_packages(), doctor.check_cpu()):
        assert check.status in ("ok", "warning"), check.detail
    assert "torch" in doctor.check_packages().detail
    store = doctor.check_store(str(tmp_path / "store"))
    assert store.status == "ok", store.detail
    assert doctor.check_espeak().status == "ok"
    assert "MP3" in doctor.check_audio().detail


def test_a_store_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = doctor.check_store(str(tmp_path / "file" / "store"))
    assert check.status == "failure"
    assert str(tmp_path / "file") in check.detail
    assert check.hint


def test_missing_and_wrong_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "goldcrest-no-such-package>=1", 'ruff>=1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    check = doctor.check_packages()
    assert check.status == "failure"
    assert "goldcrest-no-such-package is missing" in check.detail
    assert "is not >=999" in check.detail
    assert "ruff" not in check.detail


@pytest.mark.parametrize(
    ("free", "status"), [(20 << 30, "ok"), (5 << 30, "warning"), (1 << 20, "failure")]
)
def test_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert doctor.check_disk(str(tmp_path / "not" / "yet" / "there")).status == status
    assert "store" not in doctor.check_disk("s3://bucket/x").detail


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_MEMORY", 1 << 60)
    assert doctor.check_memory().status == "warning"


def test_a_check_that_breaks_is_itself_the_finding() -> None:
    def broken() -> Check:
        raise RuntimeError("at s3://k:secret@b")

    check = doctor._guarded("store", broken)
    assert check.status == "failure"
    assert check.detail == "RuntimeError: at s3://***@b"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no driver')", "failed: no driver"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by signal 11"),
        ("pass", "failed: exit code 0"),
    ],
)
def test_children_that_fail_are_named_in_words(code: str, said: str) -> None:
    line, reason = finish(start_child(code), "the child")
    assert line == ""
    assert said in reason


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_finding, "CHILD_SECONDS", 0.5)
    child = start_child("import time; time.sleep(60)")
    assert finish(child, "the child") == ("", "the child did not answer within 0 s")
    assert child.poll() is not None


class FakeRay:
    """Answers as the child that starts Ray does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, knock: str) -> None:
        facts = '{"version": "2", "start": 1.0, "nodes": 1, "resources": {"CPU": 2}, "gcs": "h:1"}'
        real = start_child

        def child(code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
            return real(f"print({facts!r})" if code == doctor_ray._RAY else f"print({knock!r})")

        monkeypatch.setattr(doctor_ray, "start_child", child)


@pytest.mark.parametrize(
    ("knock", "status", "said"),
    [
        ("closed", "ok", "strangers are turned away"),
        ("open", "failure", "runs anybody's code"),
        ("unknown: timeout", "warning", "unknown: timeout"),
    ],
)
def test_an_open_cluster_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, knock: str, status: str, said: str
) -> None:
    FakeRay(monkeypatch, knock)
    check = doctor_ray.check_ray(None)
    assert check.status == status
    assert said in check.detail


def test_a_cluster_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = start_child
    monkeypatch.setattr(
        doctor_ray, "start_child", lambda code, *a, **k: real("import sys; sys.exit('no cluster')")
    )
    check = doctor_ray.check_ray("10.0.0.1:6379")
    assert check.status == "failure"
    assert "Ray at 10.0.0.1:6379 failed: no cluster" in check.detail


def test_the_door_of_a_real_cluster(ray_cluster: None) -> None:
    """Ray 2.60 asks for a token by default; a knock without one is turned away."""
    import ray

    assert doctor_ray.knock(ray.get_runtime_context().gcs_address) == "closed"


@pytest.mark.parametrize(
    ("knocks", "status", "said"),
    [
        ({}, "ok", "no other Ray runs here"),
        ({"a:1": "closed", "b:2": "closed"}, "ok", "Ray at a:1, b:2: strangers are turned away"),
        ({"a:1": "closed", "b:2": "open"}, "failure", "Ray at b:2; this cluster runs anybody's"),
        ({"a:1": "closed", "b:2": "no answer"}, "warning", "Ray at b:2: no answer"),
    ],
)
def test_the_doors_of_clusters_that_run_already(
    monkeypatch: pytest.MonkeyPatch, knocks: dict[str, str], status: str, said: str
) -> None:
    monkeypatch.setattr(doctor_ray, "knock", knocks.__getitem__)
    check = doctor_ray.check_doors(tuple(knocks))
    assert (check.name, check.status) == ("doors", status)
    assert said in check.detail


def test_clusters_that_run_already_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line of Ray's own process, and by the variable that runs heed."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    before = set(doctor_ray.other_clusters(None))
    command = ["/opt/ray/raylet", "-c", "read line", "--gcs-address=10.9.8.7:6379"]
    with subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE) as process:
        monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
        found = set(doctor_ray.other_clusters(None))
        process.communicate(b"\n")
    assert found - before >= {"10.9.8.7:6379", "http://head:8265"}
    assert "http://head:8265" not in doctor_ray.other_clusters("http://head:8265")


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """The URL of a server that answers everything with one status."""

    class Always(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "found"), [(200, "failure"), (401, "ok"), (500, "failure")])
def test_a_proxy_is_not_taken_for_the_dashboard(
    monkeypatch: pytest.MonkeyPatch, status: int, found: str
) -> None:
    """One that refuses would make an open cluster a closed one."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering(403) as proxy, answering(status) as dashboard:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        check = doctor_ray.check_ray(dashboard)
    assert check.status == found
    assert ("runs anybody's code" in check.detail) == (status == 200)


def test_one_failure_makes_the_whole_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(name: str, status: Any) -> Check:
        return Check(name=name, status=status, detail="d", hint="h" if status != "ok" else "")

    names = [name for name in vars(doctor) if name.startswith("check_")]
    for name in names:
        monkeypatch.setattr(doctor, name, lambda *_, n=name: finding(n, "ok"))
    assert doctor.diagnose(store="x")["ok"] is True
    monkeypatch.setattr(doctor, "check_gpu", lambda: finding("gpu", "warning"))
    assert doctor.diagnose(store="x")["ok"] is True
    monkeypatch.setattr(doctor, "check_ray", lambda _: finding("ray", "failure"))
    found = doctor.diagnose(store="x")
    assert found["ok"] is False
    lines = summary_lines(found["checks"])
    assert sum("FAILURE" in line for line in lines) == 1
    assert len(found["checks"]) == len(names)


def test_mlflow_is_imported_and_a_missing_server_is_only_a_warning() -> None:
    assert doctor.check_mlflow(None).status == "ok"
    check = doctor.check_mlflow("http://127.0.0.1:9")  # the discard port: nobody listens there
    assert check.status == "warning"
    assert "--no-tracking" in check.hint

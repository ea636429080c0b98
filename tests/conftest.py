"""Settings that every test shares: no hub, no telemetry, few threads, one Ray for the session."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.cluster.dashboard_cluster import DashboardCluster, dashboard_cluster
from tests.end_to_end.command_line import SmallRun, goldcrest
from tests.reliability import Tally

if TYPE_CHECKING:
    from tests.pipelines.speaker_server import Server
    from tests.pipelines.text_server import TextClient

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # The suite's processes share two cores: one native thread each, the same in every run.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
os.environ.update(_OFFLINE)  # before any test module imports torch, ray or transformers


hypothesis.settings.register_profile("fixed", derandomize=True)
"""Of `make test`: the same examples everywhere. The long form searches on."""

_COSTLY = ("job_cluster", "small_run", "speaker_server", "text_server")
"""Fixtures that take many seconds to make: tests that share one follow each other."""
_OPEN: dict[str, ExitStack] = {}
"""What is to be ended with the last test that uses a fixture, not with the session: a server that
nobody calls any more still takes its share of two cores."""


def pytest_configure(config: pytest.Config) -> None:
    """Count what the scenarios of docs/reliability.md tried."""
    config.pluginmanager.register(Tally())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a costly fixture follow each other."""
    first: dict[str, int] = {}
    groups: dict[pytest.Item, str] = {}
    for item in items:
        shared = [name for name in _COSTLY if name in getattr(item, "fixturenames", ())]
        groups[item] = group = shared[0] if shared else str(item.path)
        first.setdefault(group, len(first))
    items.sort(key=lambda item: first[groups[item]])


@functools.cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but files that share a costly fixture go to one process.

    `--dist loadgroup` would do, were its groups not lost: xdist 3.8 writes them into a node's
    `_nodeid`, from which pytest 9.2 does not make the node's name.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            text = _read(config.rootpath / file)
            return next((name for name in _COSTLY if f"{name}: " in text), file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)  # after the test's own fixtures
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End what no later test uses."""
    for name in [name for name in _OPEN if name in getattr(item, "fixturenames", ())]:
        if nextitem is None or name not in getattr(nextitem, "fixturenames", ()):
            _OPEN.pop(name).close()


@contextmanager
def _open(name: str) -> Iterator[ExitStack]:
    """A stack that is closed with the last test that uses the fixture `name`."""
    _OPEN[name] = ExitStack()
    yield _OPEN[name]
    if name in _OPEN:
        _OPEN.pop(name).close()


@pytest.fixture(autouse=True, scope="session")
def _private_cache() -> Iterator[None]:
    """What the tests remember of input files goes to a folder of their own."""
    before = os.environ.get("GOLDCREST_CACHE")
    with tempfile.TemporaryDirectory(prefix="goldcrest-test-") as folder:
        os.environ["GOLDCREST_CACHE"] = folder
        yield
        if before is None:
            del os.environ["GOLDCREST_CACHE"]
        else:
            os.environ["GOLDCREST_CACHE"] = before


@pytest.fixture(scope="session")
def ray_cluster(_private_cache: None) -> Iterator[None]:
    """One Ray of two CPU cores for all tests that need one; `run` attaches to it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def speaker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`goldcrest serve` on two small bundles, for all tests that call it over HTTP.

    Two replicas of each side are for the tests of agreement and of lost replicas, the small limits
    for those of big and slow requests.
    """
    from tests.pipelines.speaker_server import make_bundle, start_server

    folder = tmp_path_factory.mktemp("serve")
    one = make_bundle(folder / "one")
    two = make_bundle(folder / "two", seed=1, thresholds={"eer": 0.99})
    profile = folder / "profile.yaml"
    profile.write_text("ray: {num_cpus: 2, object_store_memory: 100MB}")
    server = start_server(
        folder, f"one={one}", f"two={two}", "--demo", "--profile", str(profile),
        "-o", "api_replicas=2", "-o", "body_seconds=3", "-o", "max_body_bytes=2000000",
        "-o", "max_requests=16", "-o", "max_seconds=10", "--replicas", "2", "-o", "cpus=0.5",
        token="a-token-of-the-tests-3f9c1b",
    )  # fmt: skip
    with _open("speaker_server") as stack:
        stack.callback(_stop, server)
        yield server


@pytest.fixture(scope="session")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextClient]:
    """`goldcrest serve` on two small bundles that read and one that hears, for all tests that call
    it over HTTP.

    Two generations run at a time, so that two endless ones let nobody else in.
    """
    from tests.pipelines.speaker_server import start_server
    from tests.pipelines.text_server import (
        TEMPLATE,
        TOKEN,
        TextClient,
        make_speech_bundle,
        make_text_bundle,
    )

    folder = tmp_path_factory.mktemp("serve-text")
    one = make_text_bundle(folder / "one")
    two = make_text_bundle(folder / "two", seed=1, template=TEMPLATE, context=200)
    ears = make_speech_bundle(folder / "ears")
    profile = folder / "profile.yaml"
    profile.write_text("ray: {num_cpus: 2, object_store_memory: 100MB}")
    server = start_server(
        folder, f"one={one}", f"two={two}", f"ears={ears}", "--demo",
        "--profile", str(profile), "-o", "cpus=0.5", "-o", "parallel=2",
        "-o", "max_context=100000", "-o", "max_tokens=90000",
        "-o", "max_body_bytes=300000", "-o", "body_seconds=3", token=TOKEN,
    )  # fmt: skip
    with _open("text_server") as stack:
        stack.callback(_stop, server)
        yield TextClient(server)


def _stop(server: Server) -> None:
    """Stop a server that a test has not stopped already."""
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="session")
def small_run(_private_cache: None, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """One whole run of the speaker pipeline by the command line, as small as the notebooks' one.

    The end-to-end tests look at it, and the notebooks find its steps in its store.
    """
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(Path(__file__).parents[1] / "notebooks" / "small.yaml", folder)
    done = goldcrest(
        *("run", "speaker", "--config", "small.yaml", "--store", "store", "--json", "run.json"),
        cwd=folder,
    )
    return SmallRun(folder, json.loads((folder / "run.json").read_text()), done.stdout)


@pytest.fixture(scope="session")
def job_cluster() -> Iterator[DashboardCluster]:
    """A Ray with a dashboard, in a process of its own: what jobs are submitted to."""
    with _open("job_cluster") as stack:
        yield stack.enter_context(dashboard_cluster())


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """A folder for a store of the test's own."""
    return tmp_path / "store"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """`host:port` of an S3 server (moto) in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3_uri(s3_server: str, tmp_path: Path) -> str:
    """The URI of an empty place in a bucket of its own."""
    import hashlib

    from pyarrow.fs import S3FileSystem

    bucket = "lab-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]
    S3FileSystem(
        access_key="user",
        secret_key="not-a-secret",
        endpoint_override=s3_server,
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    ).create_dir(bucket)
    query = f"endpoint_override={s3_server}&scheme=http&region=us-east-1"
    return f"s3://user:not-a-secret@{bucket}/store?{query}"

"""Settings that every test shares: no hub, no telemetry, few threads, one Ray for the session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """A folder for a store of the test's own."""
    return tmp_path / "store"

"""Every notebook runs from top to bottom in a fresh process, keeps no outputs that lie, and leaves
neither processes nor files behind.

They share a store, as a reader's do, and find in it what the run of the end-to-end tests has made
with the same settings; in the long form the first one also fills an empty store.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.command_line import SmallRun

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
END_SECONDS = 30.0  # for Ray's processes to go, after the kernel that started them


def read(path: Path) -> Any:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def processes(store: Path) -> Iterator[str]:
    """Processes that know this store from their environment: all that a notebook has started."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("GOLDCREST_STORE") == str(store):
                yield f"{process.pid} {process.name()}"


def files() -> set[Path]:
    """What lies beside the notebooks and at the root."""
    found = {*ROOT.iterdir(), *(ROOT / "notebooks").iterdir()}
    made_by_others = re.compile(r"build|.*cache(__)?")
    return {path for path in found if not made_by_others.fullmatch(path.name)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_no_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(path, small_run.folder / "store", monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_notebook_fills_an_empty_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(NOTEBOOKS[0], tmp_path / "store", monkeypatch)


def execute(path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook on a store; nothing may be left of it but what is in the store."""
    from nbclient import NotebookClient

    monkeypatch.setenv("GOLDCREST_STORE", str(store))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    before = files()
    notebook = read(path)
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": path.parent}})
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    stderr = [o for cell in ran for o in cell.outputs if o.output_type == "error"]
    assert not stderr
    assert files() == before
    limit = time.monotonic() + END_SECONDS
    while list(processes(store)) and time.monotonic() < limit:
        time.sleep(0.5)
    assert not list(processes(store))

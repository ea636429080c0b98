"""`goldcrest.*` in the four ways of running: checkout, editable, wheel, packaged working tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = (
    "import goldcrest.kernels.margin.aam, goldcrest.cluster.api, goldcrest.tasks.methods,"
    " goldcrest.pipelines.speaker; print(goldcrest.cluster.api.__file__)"
)


def python(code: str, folder: Path, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def checkout(folder: Path) -> Path:
    """A copy of what a working tree holds, links as links."""
    for name in ("goldcrest", "kernels", "cluster", "tasks", "pipelines"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_installed_editable(tmp_path: Path) -> None:
    assert Path(python(PROBE, tmp_path)).resolve() == ROOT / "cluster" / "api.py"


def test_from_a_checkout(tmp_path: Path) -> None:
    tree = checkout(tmp_path)
    assert Path(python(PROBE, tree, path=tree)).is_relative_to(tree)


def test_as_a_wheel(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree" if (tmp_path / "tree").mkdir() is None else tmp_path)
    build = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    name = python(build, tree).splitlines()[-1]
    with zipfile.ZipFile(tree / name) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    assert "goldcrest/kernels/margin/aam.py" in names
    assert not [entry for entry in names if entry.startswith(("kernels/", "cluster/", "tasks/"))]
    shutil.rmtree(tree)
    found = Path(python(PROBE, tmp_path, path=tmp_path / "site"))
    assert found.is_relative_to(tmp_path / "site")


def test_packed_for_another_node(tmp_path: Path) -> None:
    """Ray zips a job's working tree and unpacks it elsewhere; links must survive as content."""
    from ray._private.runtime_env.packaging import _zip_files

    tree = checkout(tmp_path / "tree" if (tmp_path / "tree").mkdir() is None else tmp_path)
    package = tmp_path / "package.zip"
    _zip_files(str(tree), [], str(package), include_parent_dir=False, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "node")
    found = Path(python(PROBE, tmp_path / "node", path=tmp_path / "node"))
    assert found.is_relative_to(tmp_path / "node")


def test_a_real_package_called_kernels_keeps_working(tmp_path: Path) -> None:
    """The Hugging Face distribution `kernels` exists; transformers imports from it."""
    site = tmp_path / "site" / "kernels"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("WHO = 'the other one'\n")
    tree = checkout(tmp_path / "tree" if (tmp_path / "tree").mkdir() is None else tmp_path)
    code = f"{PROBE}; import kernels; print(kernels.WHO)"
    both = f"{tree}{os.pathsep}{site.parent}"
    assert python(code, tree, path=Path(both)).splitlines()[-1] == "the other one"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_transformers_models_import_beside_us(tmp_path: Path, name: str) -> None:
    code = f"import goldcrest.kernels.margin.aam; from transformers import {name}; print({name})"
    assert name in python(code, ROOT)

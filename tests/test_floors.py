"""The floors and the rules of the tree, read from the source (see ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "cluster", "tasks", "pipelines")


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def every_source() -> list[Path]:
    return [path for floor in FLOORS for path in sources(floor)]


def test_the_folders_hold_source() -> None:
    assert all(len(sources(floor)) > 3 for floor in FLOORS)


def test_tasks_see_only_the_face_of_the_cluster() -> None:
    for path in sources("tasks"):
        for name in imports(path):
            if name.startswith("goldcrest.cluster"):
                assert name in ("goldcrest.cluster", "goldcrest.cluster.api") or name.startswith(
                    "goldcrest.cluster.api."
                ), f"{path} imports {name}"


def test_kernels_touch_no_files_and_print_nothing() -> None:
    for path in sources("kernels"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "print"), f"{path}:{node.lineno}"


def test_only_one_file_touches_ray_dag() -> None:
    touching = {path.name for path in sources("cluster") if "ray.dag" in set(imports(path))}
    assert touching == {"dag.py"}


def test_no_bare_import_names() -> None:
    """The same file under two names would be two modules."""
    for path in [*every_source(), *sorted((ROOT / "tests").rglob("*.py"))]:
        for name in imports(path):
            assert name.split(".")[0] not in FLOORS, f"{path} imports {name}"


def test_no_package_shadows_a_real_one() -> None:
    assert not [floor for floor in FLOORS if (ROOT / floor / "__init__.py").exists()]


@pytest.mark.parametrize(
    "pattern",
    [
        r"\b(cloud)?pickle\.load|\bread_pickle\b|\bjoblib\.load",
        r"from (cloud)?pickle import|allow_pickle\s*=\s*True",
        r"\btorch\.load\(",
        r"\byaml\.(unsafe_)?load\(",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"shell\s*=\s*True",
        r"os\.(system|popen)\(",
        r"except:\s*$",
        r"except Exception:\s*pass",
        r"\b(TODO|FIXME|XXX)\b",
    ],
)
def test_what_must_not_stand_in_the_source(pattern: str) -> None:
    for path in every_source():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not re.search(pattern, line), f"{path}:{number}: {line.strip()}"


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in every_source():
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing


def test_every_module_says_what_it_is() -> None:
    silent = [p for p in every_source() if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert not silent


@pytest.mark.parametrize("family", ["clustering", "margin", "sparsity", "weight_only"])
def test_every_method_of_a_family_is_in_the_contract_of_independence(family: str) -> None:
    module = importlib.import_module(f"goldcrest.kernels.{family}")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = (
        each for each in contracts["tool"]["importlinter"]["contracts"]
        if each["type"] == "independence"
    )  # fmt: skip
    named = {name for name in contract["modules"] if f".{family}." in name}
    assert named == {f"goldcrest.kernels.{family}.{method}" for method in module.methods()}

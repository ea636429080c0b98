"""Pipelines, their configs and the methods of kernels, found by the files that exist.

The file name is the registration: `pipelines/speaker.py` is the pipeline `speaker` because it
defines `Config` and `build`; `configs/speaker/tiny.yaml` is its config `tiny`. Looking does not
import anything. A pipeline of one's own, outside this package, is named by its module:
`goldcrest run my_package.my_pipeline`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldcrest.cluster.api import Config
from goldcrest.cluster.errors import InputError

_HERE = Path(__file__).resolve().parent
_PACKAGE = "goldcrest.pipelines"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline module: its `Config` class and its `build` function."""

    name: str
    module: Any
    config_class: type[Config]
    build: Callable[..., Any]


def pipeline_files(folder: Path = _HERE) -> dict[str, Path]:
    """`{name: file}` of every module in `folder` that defines `Config` and `build`."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        if {"Config", "build"} <= _defined_names(path):
            found[path.stem] = path
    return found


def _defined_names(path: Path) -> set[str]:
    """Names that a module defines at its top level, as far as its syntax tells."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return set()
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


def describe(path: Path) -> str:
    """The first line of a module's docstring."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return ""
    return (text or "").strip().splitlines()[0] if text else ""


def load_pipeline(name: str) -> Pipeline:
    """The pipeline of this name, or of this dotted module name; InputError if there is none."""
    files = pipeline_files()
    if name in files:
        module = importlib.import_module(f"{_PACKAGE}.{name}")
    elif _MODULE.fullmatch(name):
        module = _import_module(name)
    else:
        near = difflib.get_close_matches(name, files, n=1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        known = ", ".join(files) or "none"
        raise InputError(
            f"there is no pipeline '{name}'{guess} (pipelines: {known})",
            hint="a pipeline is a file in pipelines/, or the dotted name of a module of yours",
        )
    config_class, build = getattr(module, "Config", None), getattr(module, "build", None)
    if not (
        isinstance(config_class, type) and issubclass(config_class, Config) and callable(build)
    ):
        raise InputError(
            f"module '{name}' is no pipeline",
            hint="it must export `Config` (a goldcrest Config) and `build(cfg)`",
        )
    return Pipeline(name=name, module=module, config_class=config_class, build=build)


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a module beside the user is found
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"there is no module '{name}'", hint="run from its folder, or set PYTHONPATH"
        ) from None


# ------------------------------------------------------------------------------ config files


def config_folders() -> list[Path]:
    """Where configs are looked for: `configs/` here, then beside the package (a checkout)."""
    folders = [Path.cwd() / "configs", _HERE.parent / "configs"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def config_files(pipeline: str) -> dict[str, Path]:
    """`{name: file}` of the YAML configs of a pipeline (or of `cluster`: the profiles)."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for path in sorted((folder / pipeline.rpartition(".")[2]).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find_config(pipeline: str, given: str | None, *, what: str = "config") -> Path | None:
    """The file that `--config given` means: a path, or the name of a config of the pipeline."""
    if given is None:
        return None
    path = Path(given)
    if path.is_file():
        return path
    named = config_files(pipeline)
    if given in named:
        return named[given]
    near = difflib.get_close_matches(path.stem, named, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    known = f" (there are: {', '.join(named)})" if named else ""
    raise InputError(f"there is no {what} '{given}'{guess}{known}")


# ------------------------------------------------------------------------ methods of kernels


def kernel_methods() -> dict[str, list[str]]:
    """`{family: [method]}`: files in `kernels/<family>/` that define their own `Settings`.

    A family with one such file is no choice and is left out.
    """
    spec = importlib.util.find_spec("goldcrest.kernels")
    places = spec.submodule_search_locations if spec is not None else None
    families: dict[str, list[str]] = {}
    for root in map(Path, places or ()):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            methods = [
                path.stem
                for path in sorted(folder.glob("*.py"))
                if not path.name.startswith("_") and "Settings" in _defined_names(path)
            ]
            if len(methods) > 1:
                families[folder.name] = methods
    return families

"""A hash of everything of ours that a task's result depends on, to notice forgotten versions.

Python is read, not run: from the task's module, imports are followed through our own packages. A
package that is imported counts with all of its modules, because methods are found there by file
name. Comments, docstrings and layout do not count. `goldcrest.cluster` does not count either: it
says where and how a step runs, never what comes out.

The hash is no part of any key. It only lets `plan` say "source changed, version not bumped".
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent  # the folder of kernels/, tasks/, ...
_FLOORS = ("kernels", "tasks", "pipelines")


@functools.cache
def source_hash(module: str) -> str:
    """SHA-256 over the module's code and, transitively, the modules of ours that it imports."""
    total = hashlib.sha256()
    for name, path in sorted(_reachable(module).items()):
        total.update(f"{name}\0{_parsed(path, path.stat().st_mtime_ns)[0]}\0".encode())
    return total.hexdigest()


def _reachable(module: str) -> dict[str, Path]:
    """Dotted name -> file of `module` and of all of ours that it needs."""
    start = _locate(module)
    found: dict[str, Path] = {} if start is None else {module: start}
    waiting = list(found)
    while waiting:
        name = waiting.pop()
        path = found[name]
        for imported in _parsed(path, path.stat().st_mtime_ns)[1]:
            for dotted, file in _modules_of(_absolute(imported, name, path)):
                if dotted not in found:
                    found[dotted] = file
                    waiting.append(dotted)
    return found


def _locate(module: str) -> Path | None:
    """The file of a module that need not be one of ours (a task may live anywhere)."""
    for dotted, path in _modules_of(module):
        if dotted == module:
            return path
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        loaded = None if spec is None else spec.origin
    return Path(loaded) if loaded and Path(loaded).is_file() else None


def _modules_of(dotted: str) -> Iterator[tuple[str, Path]]:
    """The files of ours behind an imported name: a module, or a package with all its modules."""
    parts = dotted.split(".")
    if len(parts) < 3 or parts[0] != "goldcrest" or parts[1] not in _FLOORS:
        return
    path = _ROOT.joinpath(*parts[1:])
    if path.with_suffix(".py").is_file():
        yield dotted, path.with_suffix(".py")
    elif path.is_dir() and (path / "__init__.py").is_file():
        for file in sorted(path.glob("*.py")):
            name = dotted if file.stem == "__init__" else f"{dotted}.{file.stem}"
            yield name, file
    else:  # `from package.module import name` was read as package.module.name
        yield from _modules_of(".".join(parts[:-1]))


def _absolute(imported: str, module: str, path: Path) -> str:
    """Resolve a relative import (leading dots) against the module that it stands in."""
    dots = len(imported) - len(imported.lstrip("."))
    if dots == 0:
        return imported
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    base = package[: len(package) - (dots - 1)]
    return ".".join([*base, imported[dots:]])


@functools.lru_cache(maxsize=4096)
def _parsed(path: Path, _changed: int) -> tuple[str, tuple[str, ...]]:
    """(hash of the code without comments and docstrings, dotted names it imports)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            joint = "" if base.endswith(".") or not base else "."
            imports.update(f"{base}{joint}{alias.name}" for alias in node.names)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _drop_docstring(node)
    code = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return code, tuple(sorted(imports))


def _drop_docstring(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> None:
    first = node.body[0] if node.body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        node.body = node.body[1:]

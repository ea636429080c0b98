"""Settings of kernels in task configs: checked against the kernel's own dataclass.

    class ClusterConfig(Config):
        method: str = "cimc"
        settings: dict[str, Any] = {}        # completed by `complete_method` in a validator

    class FeatureConfig(Config):
        vad: Annotated[dict[str, Any], SettingsOf("goldcrest.kernels.frontend.vad", "VadSettings")]

After validation a config holds *all* settings, defaults filled in, so that a changed default of a
kernel changes the key of the artifacts that it made.

Reading a kernel's dataclass imports torch (two seconds), which a run that is wholly cached must not
pay for. A kernel's answer depends on its source and the given values alone, so answers are kept in
a small cache under the user's cache folder, keyed by both (`remembered`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import core_schema


class SettingsOf:
    """Pydantic annotation: a mapping that is validated and completed by a kernel's dataclass."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda given: complete_settings(self.module, self.name, given), handler(source)
        )


def settings_of(module: str, name: str, given: Mapping[str, Any]) -> Any:
    """The kernel's settings object for (already completed) values; imports the kernel."""
    return _parse(getattr(importlib.import_module(module), name), given)


def method_names(family: str) -> list[str]:
    """Methods of a family: its files that define `Settings`, found without importing them."""
    names = []
    for path in sorted(_folder(family).glob("*.py")):
        if not path.name.startswith("_") and "\nclass Settings" in path.read_text("utf-8"):
            names.append(path.stem)
    return names


def check_method(family: str, method: str) -> None:
    """ValueError naming the methods there are, when `method` is not a file of the family."""
    known = method_names(family)
    if method not in known:
        near = difflib.get_close_matches(method, known, 1)
        guess = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"there is no method '{method}'{guess} There are: {', '.join(known)}")


def complete_method(family: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a family's method, defaults filled in; ValueError names what is wrong."""
    check_method(family, method)
    return complete_settings(f"{family}.{method}", "Settings", given)


def complete_settings(module: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` checked against dataclass `name` of `module` and completed with its defaults."""

    def ask() -> dict[str, Any]:
        return dataclasses.asdict(settings_of(module, name, given))

    answer = remembered([module, name, dict(given)], [module], ask)
    return typing.cast(dict[str, Any], answer)


def remembered(question: Sequence[Any], modules: Sequence[str], ask: Callable[[], Any]) -> Any:
    """`ask()` as plain JSON, or what it answered before to the same question.

    The answer must depend on nothing but `question` and the sources in the folders (families of
    kernels, tasks) that `modules` belong to. An exception is not remembered.
    """
    asked = json.dumps(question, sort_keys=True, default=str).encode()
    sources = b"".join(_source(module) for module in modules)
    cached = _cache_folder() / f"{hashlib.sha256(sources + asked).hexdigest()}.json"
    try:
        return json.loads(cached.read_text("utf-8"))
    except (OSError, ValueError):
        pass  # not answered yet, or a torn file: ask the kernel
    answer = json.loads(json.dumps(ask()))
    _remember(cached, answer)
    return answer


def _parse(settings_class: Any, given: Mapping[str, Any]) -> Any:
    allowed = [item.name for item in dataclasses.fields(settings_class)]
    for field in given:
        if field not in allowed:
            near = difflib.get_close_matches(field, allowed, 1)
            guess = f"; did you mean '{near[0]}'?" if near else "."
            raise ValueError(f"unknown setting '{field}'{guess} Allowed: {', '.join(allowed)}")
    try:
        return TypeAdapter(settings_class).validate_python(dict(given))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
            for item in error.errors()
        )
        raise ValueError(problems) from error


def _folder(family: str) -> Path:
    spec = importlib.util.find_spec(family)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{family} is not a family of kernels")
    return Path(next(iter(spec.submodule_search_locations)))


def _source(module: str) -> bytes:
    """The bytes of all files of the kernel's family: what its settings can depend on."""
    folder = _folder(module.rpartition(".")[0])
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))


def _cache_folder() -> Path:
    own = os.environ.get("GOLDCREST_CACHE")
    return Path(own or Path.home() / ".cache" / "goldcrest") / "settings"


def _remember(path: Path, answer: Any) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(answer), "utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a read-only home only costs time

"""Configuration files: YAML plus `field=value` overrides become one validated `Config`.

The YAML is data and nothing else: no tags, no anchors, no duplicate keys, bounded in size and
depth. Scalars follow the JSON-like core schema of YAML 1.2, because the older rules that PyYAML
keeps read `1e-3` as text, `1:30` as ninety, `010` as eight and `no` as false.

Whatever is wrong ends in one `InputError` that names every bad field, the nearest right name and
what is allowed; nothing has been started by then.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.masking import MASK, is_secret_name

MAX_BYTES = 1 << 20
"""Largest configuration file or override, in bytes."""
MAX_DEPTH = 24
"""Deepest nesting of mappings and lists."""
MAX_NODES = 50_000
"""Most values in one file."""
_LISTED = 12

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Tree = dict[str, Any]


# ---------------------------------------------------------------------------- reading YAML


class _PlainLoader(yaml.SafeLoader):
    """A safe loader of plain data: YAML 1.2 core scalars, no tags, no aliases, no duplicates."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, refusing aliases and too much of anything."""
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.events.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed", problem_mark=mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags (!...) are not allowed", problem_mark=mark)
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=mark)
        if self._nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping with text keys, each given once."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem="field names must be plain text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"field '{key}' is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_DECIMAL = re.compile(r"[-+]?[0-9]+$")


def _construct_int(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


def _construct_float(loader: _PlainLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)))


_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", _DECIMAL.pattern, list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, *, where: str) -> Any:
    """The plain data in `text`; `where` names it in errors.

    Raises InputError with line and column when the text is not plain, bounded YAML.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise InputError(f"{where} is larger than {MAX_BYTES >> 10} KiB")
    loader: _PlainLoader | None = None
    try:
        loader = _PlainLoader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        raise InputError(f"{where}{place}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path) -> Tree:
    """The mapping in the YAML file `path`, `{}` for an empty file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 10} KiB")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration file {path} cannot be read: {error}") from None
    tree = parse_yaml(text, where=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold fields (name: value), not a {type(tree).__name__}")
    return tree


# ------------------------------------------------------------------------------ overrides


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`"clustering.settings.mu=4"` as `(("clustering", "settings", "mu"), 4)`."""
    name, equals, value = text.partition("=")
    parts = tuple(part.strip() for part in name.split("."))
    if not equals or not all(parts):
        raise InputError(f"'{text}' is not an override", hint="write it as field.subfield=value")
    if not value.strip():
        raise InputError(f"'{text}' gives no value", hint=f"write {name}=null or {name}=''")
    return parts, parse_yaml(value, where=f"-o {name}")


def apply_override(tree: Tree, path: Sequence[str], value: Any) -> None:
    """Set the field at `path` in a tree of mappings and lists, in place."""
    at: Any = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        dotted = ".".join(path[: depth + 1])
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                raise InputError(
                    f"'{dotted}' is no element of a list of {len(at)}",
                    hint="give the whole list, such as field=[1, 2]",
                )
            step: Any = int(part)
        elif isinstance(at, dict):
            step = part
        else:
            raise InputError(f"'{'.'.join(path[:depth])}' is a value and has no field '{part}'")
        if last:
            at[step] = value
        else:
            if isinstance(at, dict) and at.get(step) is None:
                at[step] = {}
            at = at[step]


# ----------------------------------------------------------------------------- validation


def load_config(
    config_class: type[ConfigT],
    *,
    file: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> ConfigT:
    """One validated config from defaults, then `file`, then `fields`, then `overrides`.

    `fields` are values by dotted name (from command-line options), `overrides` texts of the form
    `field.subfield=value`. Raises InputError that names every field that is wrong.
    """
    tree = config_tree(file=file, fields=fields, overrides=overrides)
    return validate(config_class, tree, where=place_of(file))


def config_tree(
    *,
    file: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> Tree:
    """What `load_config` validates: the plain values as they were given, without defaults."""
    tree = read_yaml(file) if file is not None else {}
    for dotted, value in (fields or {}).items():
        apply_override(tree, dotted.split("."), value)
    for text in overrides:
        path, value = parse_override(text)
        apply_override(tree, path, value)
    return tree


def place_of(file: Path | None) -> str:
    """How messages call the configuration that `file` holds."""
    return str(file) if file is not None else "the configuration"


def validate(config_class: type[ConfigT], tree: Mapping[str, Any], *, where: str) -> ConfigT:
    """`tree` as a `config_class`, or an InputError with one line per wrong field."""
    try:
        config = config_class.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_explain(config_class, dict(detail)) for detail in error.errors(include_url=False)]
        if len(lines) == 1:
            raise InputError(f"{where}: {lines[0]}") from None
        raise InputError(
            f"{where}: {len(lines)} fields are wrong\n  " + "\n  ".join(lines)
        ) from None
    for dotted, value in flatten(config.model_dump(mode="python")).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: field '{dotted}' is {value}; give a finite number")
    return config


def _explain(config_class: type[BaseModel], detail: Mapping[str, Any]) -> str:
    location = _field_path(config_class, detail["loc"])
    dotted = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = sorted(_fields_at(config_class, location[:-1]))
        group = f"fields of {'.'.join(location[:-1])}" if location[:-1] else "fields"
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        guess = f"; did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else ""
        elsewhere = "" if near else _elsewhere(config_class, location[-1])
        return f"there is no field '{dotted}'{guess}{elsewhere} ({group}: {', '.join(known)})"
    if detail["type"] == "missing":
        return f"field '{dotted}' is required and was not given"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not dotted:
        return message
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "Input should be a group of fields"
    given = MASK if any(map(is_secret_name, location)) else _short(detail.get("input"))
    if message.startswith("Input should be "):
        allowed = message.removeprefix("Input should be ")
        return f"field '{dotted}' should be {allowed}, not {given}"
    if isinstance(detail.get("input"), Mapping):
        return f"in '{dotted}': {message}"
    return f"field '{dotted}' is {given}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _elsewhere(config_class: type[BaseModel], name: str) -> str:
    """A hint for a field written at the wrong level: where fields of this name do exist."""
    places = [dotted for dotted, _ in walk_fields(config_class) if dotted.split(".")[-1] == name]
    return f"; did you mean {' or '.join(repr(p) for p in places[:3])}?" if places else ""


def _field_path(config_class: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Pydantic's location without the parts that name union branches rather than fields."""
    path: list[str] = []
    inside: list[Any] = [config_class]
    for part in loc:
        models = [kind for kind in inside if _is_model(kind)]
        found = [
            m.model_fields[str(part)].annotation for m in models if str(part) in m.model_fields
        ]
        if models and not found and part != loc[-1]:
            continue  # the name of a union's branch
        path.append(str(part))
        inside = [kind for annotation in found for kind in _kinds(annotation)] if models else inside
    return path


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kinds(annotation: Any) -> list[Any]:
    """The classes inside an annotation: through Optional, unions, Annotated, tuples and dicts."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return [annotation]
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        arguments = arguments[:1]
    nested = [kind for argument in arguments for kind in _kinds(argument)]
    plain = [] if origin in (typing.Union, types.UnionType, typing.Annotated) else [origin]
    models = [kind for kind in nested if _is_model(kind)]
    return models or plain or nested


def _fields_at(config_class: type[BaseModel], path: Sequence[str]) -> list[str]:
    inside: list[Any] = [config_class]
    for part in path:
        models = [kind for kind in inside if _is_model(kind)]
        found = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if found:
            inside = [kind for annotation in found for kind in _kinds(annotation)]
    return [name for kind in inside if _is_model(kind) for name in kind.model_fields]


# --------------------------------------------------------------- showing, comparing, describing


def walk_fields(config_class: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field of a config class as `(dotted name, pydantic FieldInfo)`."""
    for name, info in config_class.model_fields.items():
        models = [kind for kind in _kinds(info.annotation) if _is_model(kind)]
        if len(models) == 1 and models[0] is not config_class:
            yield from walk_fields(models[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree of mappings by dotted name; lists and empty mappings are leaves."""
    if not isinstance(value, Mapping) or (not value and prefix):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def to_yaml(tree: Mapping[str, Any]) -> str:
    """A config's plain values (`model_dump(mode="json")`) as YAML that `load_config` reads back."""
    return yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


class _PlainDumper(yaml.SafeDumper):
    """Writes what the loader above reads back: the same scalar rules, never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always true: the loader refuses aliases."""
        return True


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_PlainDumper.yaml_implicit_resolvers = _PlainLoader.yaml_implicit_resolvers
_PlainDumper.add_representer(float, _represent_float)


def difference(left: BaseModel, right: BaseModel) -> list[tuple[str, Any, Any]]:
    """`(dotted name, left value, right value)` of every field in which two configs differ."""
    one, two = flatten(left.model_dump(mode="json")), flatten(right.model_dump(mode="json"))
    names = list(dict.fromkeys([*one, *two]))
    missing = "(absent)"
    pairs = [(name, one.get(name, missing), two.get(name, missing)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def describe_fields(config_class: type[BaseModel]) -> list[dict[str, str]]:
    """One row per leaf field: `field`, `type`, `default`, `description`."""
    return [
        {
            "field": dotted,
            "type": _type_name(info.annotation),
            "default": "(required)"
            if info.is_required()
            else repr(info.get_default(call_default_factory=True)),
            "description": info.description or "",
        }
        for dotted, info in walk_fields(config_class)
    ]


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(annotation))
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")

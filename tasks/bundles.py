"""What every kind of bundle has in common: a checked bundle.json, tensors, errors that name it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldcrest.cluster.api import InputError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_JSON = 1 << 20  # bytes; the description of a model with thousands of matrices has fewer


def read_json(path: Path) -> Any:
    """The content of a bundle's JSON file; InputError where it can't be read."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_JSON + 1)
        if len(content) > _MAX_JSON:
            raise InputError(
                f"{path} can't be read: it is larger than {_MAX_JSON >> 20} MiB",
                hint="a bundle's JSON files are small: is it what was written with the bundle?",
            )
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    except RecursionError:
        raise InputError(
            f"{path} can't be read: it is nested too deeply",
            hint="a bundle's JSON files are flat: is it what was written with the bundle?",
        ) from None


def read_description(folder: Path, *, kind: str, schema: int) -> dict[str, Any]:
    """The bundle.json of a folder; InputError unless it describes that kind in that schema."""
    path = folder / "bundle.json"
    description = read_json(path)
    if not isinstance(description, dict) or description.get("kind") != kind:
        raise InputError(f"{path} does not describe a bundle of kind '{kind}'")
    if description.get("schema") != schema:
        raise InputError(
            f"{path} has schema {description.get('schema')}, this version reads {schema}"
        )
    return description


def load_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a bundle's model.safetensors, bitmask-packed ones unpacked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from goldcrest.kernels.sparsity.packing import unpack_state

    path = folder / "model.safetensors"
    try:
        state = unpack_state(load_file(path))
        for name, value in state.items():
            _check_finite(name, value)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    return state


def _check_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    # A NaN is both the least and the greatest; a mask of all values would need as much memory.
    if not all(bool(end.isfinite()) for end in value.aminmax()):
        raise ValueError(f"the weight '{name}' holds NaN or infinite values")


def check_state(state: Mapping[str, Tensor], wanted: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError naming a tensor of the state that is not as the model wants it (on "meta").

    Loading alone would take another precision, which fails once the model runs, or never.
    """
    known = set()
    for name, value in wanted:
        known.add(name)
        if name not in state:
            raise ValueError(f"it lacks the weight '{name}'")
        found = state[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"the weight '{name}' is {tuple(found.shape)} {found.dtype}, "
                f"not {tuple(value.shape)} {value.dtype}"
            )
    for name in state:
        if name not in known:
            raise ValueError(f"it holds the unknown weight '{name}'")


@contextmanager
def told_as_input(folder: Path) -> Iterator[None]:
    """What a damaged or foreign bundle raises inside, as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"the bundle {folder} lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the bundle {folder} can't be used: {reason}") from error

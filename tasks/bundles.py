"""What every kind of bundle has in common: a checked bundle.json, tensors, errors that name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        return unpack_state(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


@contextmanager
def told_as_input(folder: Path) -> Iterator[None]:
    """What a damaged or foreign bundle raises inside, as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"the bundle {folder} lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the bundle {folder} can't be used: {reason}") from error

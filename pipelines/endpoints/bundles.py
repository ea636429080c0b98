"""What endpoints of every kind have in common: bundles by name, recognised by their content.

The bundles that are served are the `user_config` of both deployments of an endpoint: changing it
swaps models while requests go on. A model's id holds the fingerprint of its files, so a folder that
has changed is another model, and what is in service stays what it was.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from pydantic import Field

from goldcrest.cluster.api import Config
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.serving import ServingSettings, page
from goldcrest.tasks.bundles import read_json

if TYPE_CHECKING:
    from ray.serve import Application

ID = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"  # of speakers and of models
DEMO_PATHS = ("/demo", "/demo/page.js")
MODELS = "models.json"  # in the scratch folder: which bundles are served
_CACHE = "__serve_multiplex_wrapper"  # where Ray Serve keeps the models of a replica
MOST_BUNDLES = 16  # of one server
MOST_HELD = 2 * MOST_BUNDLES  # by one replica: while models are swapped, the old and the new ones
_MODULES = {"speaker-embedding": "speaker", "language": "generate"}  # kind of bundle -> endpoint


class BundleSettings(ServingSettings):
    """Settings of an endpoint that serves bundles."""

    models: dict[str, Any] | None = Field(
        None,
        description="a ModelChoice, or `file:` one as JSON; in a Serve config file it is better "
        "given as `user_config` of both deployments, which restarts nothing",
    )
    demo: bool = Field(False, description="serve the page `/demo`")


class BundleChoice(Config):
    """Which bundles are served: the `user_config` of both deployments of an endpoint."""

    bundles: dict[Annotated[str, Field(pattern=ID)], Path] = Field(
        min_length=1,
        max_length=MOST_BUNDLES,
        description="name -> folder; the first is the default",
    )

    @classmethod
    def read(cls, user_config: Mapping[str, Any]) -> Self:
        """The choice that a `user_config` holds, or that the file lies in which it names."""
        if set(user_config) != {"file"}:
            return cls.model_validate(user_config)
        return cls.model_validate_json(Path(user_config["file"]).read_text("utf-8"))


# --------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True, kw_only=True)
class ServedKind:
    """What `goldcrest serve` has to know of the endpoint for a kind of bundle."""

    endpoint: str  # deployment of the HTTP side
    models: str  # deployment of the models
    settings: type[BundleSettings]
    choice: type[BundleChoice]
    application: Callable[[Any], Application]
    members: Callable[[Path], Sequence[str]]  # files of a bundle that serving reads
    identity: Callable[[Path], str]  # model id of a bundle
    check: Callable[[Any], None]  # of a choice: InputError if one of its bundles can't be served

    @property
    def import_path(self) -> str:
        """The application as a Serve config file names it."""
        return f"{self.application.__module__}:{self.application.__name__}"


def served_kind(folder: Path) -> tuple[ServedKind, str]:
    """The endpoint for the bundle in a folder, and the bundle's own name; InputError if none is."""
    path = folder / "bundle.json"
    description = read_json(path)
    kind = description.get("kind") if isinstance(description, dict) else None
    if not isinstance(kind, str) or kind not in _MODULES:
        raise InputError(
            f"{path} describes no bundle that can be served",
            hint=f"kinds with an endpoint: {', '.join(_MODULES)}",
        )
    module = importlib.import_module(f"goldcrest.pipelines.endpoints.{_MODULES[kind]}")
    return module.SERVED, str(description.get("name", "model"))


# ------------------------------------------------------------------------------------ identity


def model_id(folder: Path, members: Iterable[str], *, max_bytes: int) -> str:
    """`fingerprint@folder`: the content of a bundle's files that decide its answers, and where."""
    digest = hashlib.sha256()
    for name in members:
        path = folder / name
        try:
            if path.stat().st_size > max_bytes:
                raise InputError(f"{path} is larger than {max_bytes >> 30} GiB")
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}") from None
    return f"{digest.hexdigest()[:16]}@{folder}"


def fingerprint(model: str) -> str:
    """The part of a `model_id` that is the content's."""
    return model.partition("@")[0]


def folder_of(model: str) -> Path:
    """The part of a `model_id` that says where."""
    return Path(model.partition("@")[2])


def refuse(
    status: int, code: str, message: str, *, retry: int | None = None, **more: Any
) -> HTTPException:
    """An error for the caller; `retry` is seconds for `Retry-After`."""
    headers = {"Retry-After": str(retry)} if retry is not None else None
    return HTTPException(status, {"code": code, "message": message, **more}, headers)


def hold(replica: object, most: int) -> None:
    """Let a replica of the model hold `most` bundles; those used least recently are let go.

    The limit of Serve's decorator has to do for any number of bundles. Left at that, a replica that
    serves one would keep thirty that were swapped out long ago. Serve keeps the models, and their
    limit, on the replica from the first load on.
    """
    cache = getattr(replica, _CACHE, None)
    if cache is not None:
        cache.max_num_models_per_replica = most


def demo_routes(path: Path) -> APIRouter:
    """The page of `--demo`, and the script of the same name beside it."""
    router = APIRouter(include_in_schema=False)

    @router.get("/demo")
    async def demo_page() -> Response:
        return page(path.read_text("utf-8"), scripts=True)

    @router.get("/demo/page.js")
    async def demo_script() -> Response:
        return Response(path.with_suffix(".js").read_text("utf-8"), media_type="text/javascript")

    return router

"""`goldcrest serve BUNDLE`: a bundle behind HTTP, in the foreground, until it is told to stop.

SIGINT and SIGTERM drain: new requests are answered 503, those inside are finished. SIGHUP looks at
the bundles again (a folder that was replaced, a run called `last`) and swaps them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from goldcrest.cluster.errors import InputError
from goldcrest.pipelines.cli_common import (
    JsonOption,
    OverrideOption,
    ProfileOption,
    StoreOption,
    answering,
    find_run,
    open_store,
    say,
    warn,
)

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.pipelines.endpoints.bundles import BundleChoice, BundleSettings, ServedKind

DEFAULT_STATE = ".goldcrest/serve"


def serve(
    bundle: Annotated[
        list[str],
        typer.Argument(
            help="a bundle's folder, or RUN[:NAME] of the store; several as NAME=BUNDLE"
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="file with the bearer token; required beyond loopback"),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="accept from this score [default: the calibration's EER]")
    ] = None,
    far: Annotated[
        float | None, typer.Option(help="accept at this false-accept rate of the calibration")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="replicas of the model")] = 1,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="replicas of the model, by load")
    ] = None,
    state: Annotated[Path, typer.Option(metavar="DIR", help="where enrolments are kept")] = Path(
        DEFAULT_STATE
    ),
    demo: Annotated[bool, typer.Option("--demo", help="also serve a page to try it")] = False,
    write_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write a Serve config for `serve deploy`; start nothing"),
    ] = None,
    override: OverrideOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    json_file: JsonOption = None,
) -> None:
    """Serve bundles over HTTP: a speaker's enrols, verifies and identifies; a language model's
    completes text and chats, as OpenAI's interface does."""
    from goldcrest.cluster.config_file import load_config

    with answering(json_file) as answer:
        least, most = _range(autoscale) if autoscale is not None else (replicas, None)
        kind, choice = _choice(bundle, store, threshold, far)
        settings = load_config(
            kind.settings,
            fields={
                "token_file": str(token_file.absolute()) if token_file is not None else None,
                "state_folder": str(state.absolute()),
                "replicas": least,
                "max_replicas": most,
                "demo": demo,
            },
            overrides=override or (),
        )
        settings = with_models_file(settings)
        check(kind, settings, choice, host)
        if write_config is not None:
            write_serve_config(write_config, kind, settings, choice, host=host, port=port)
            answer.value = {"config": str(write_config)}
            return

        def look_again() -> BundleChoice:
            found, anew = _choice(bundle, store, threshold, far)
            if found is not kind:
                raise InputError("the bundles are of another kind than those in service")
            check(kind, settings, anew, host)
            return anew

        from goldcrest.pipelines.serve_foreground import Foreground

        foreground = Foreground(answer, kind, settings, look_again, json_file=json_file)
        foreground.run(_profile(profile), host=host, port=port, choice=choice)


def with_models_file(settings: BundleSettings) -> BundleSettings:
    """The settings with an absolute state folder, and replicas told of the file there that names
    their bundles: also where `-o state_folder=...` has moved it."""
    from goldcrest.pipelines.endpoints.bundles import MODELS

    models = {"file": str(settings.scratch_folder / MODELS)}
    folder = settings.state_folder.absolute()
    return settings.model_copy(update={"state_folder": folder, "models": models})


def _profile(given: str | None) -> Profile:
    from goldcrest.cluster.profile import Profile
    from goldcrest.pipelines.discovery import find_config

    path = find_config("cluster", given, what="profile")
    return Profile.load(path) if path is not None else Profile()


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise InputError(f"--autoscale {text} is not MIN:MAX", hint="for example --autoscale 1:4")
    return int(least), int(most)


# ------------------------------------------------------------------------------------- bundles


def _choice(
    bundles: Sequence[str], store: str | None, threshold: float | None, far: float | None
) -> tuple[ServedKind, BundleChoice]:
    """What the arguments name, looked up now: the endpoint for it, and the bundles."""
    from goldcrest.cluster.config_file import validate
    from goldcrest.pipelines.endpoints.bundles import served_kind

    folders: dict[str, str] = {}
    kinds: list[ServedKind] = []
    for given in bundles:
        name, equals, where = given.partition("=")
        folder = find_bundle(where if equals else given, store)
        kind, own_name = served_kind(folder)
        kinds.append(kind)
        name = name if equals else own_name
        if name in folders:
            raise InputError(f"two bundles are called '{name}'", hint="give them as NAME=BUNDLE")
        folders[name] = str(folder)
    kind = kinds[0]
    if any(other is not kind for other in kinds):
        raise InputError("these bundles are of different kinds", hint="serve each kind by itself")
    given_options = {"threshold": threshold, "far": far}
    options = {name: value for name, value in given_options.items() if value is not None}
    for name in options:
        if name not in kind.choice.model_fields:
            raise InputError(f"--{name} is for bundles that verify speakers")
    return kind, validate(kind.choice, {"bundles": folders, **options}, where="the options")


def find_bundle(given: str, store: str | None) -> Path:
    """The folder that BUNDLE names: a folder, or `RUN[:NAME]` of the store."""
    folder = Path(given)
    if folder.is_dir():
        return folder.resolve()
    run, _, name = given.partition(":")
    if "/" in given or not run:
        raise InputError(f"the bundle {given} is not a folder")
    found, record = find_run(open_store(store), run)
    bundles = _recorded_bundles(record)
    if not bundles:
        raise InputError(f"run '{found}' has made no bundle")
    name = name or list(bundles)[-1]  # the last that the chain made
    if name not in bundles:
        raise InputError(
            f"run '{found}' has no bundle '{name}'", hint=f"it has: {', '.join(bundles)}"
        )
    folder = Path(bundles[name])
    if not folder.is_dir():
        raise InputError(f"the bundle {folder} of run '{found}' is not there any more")
    return folder.resolve()


def _recorded_bundles(record: Path) -> dict[str, str]:
    import json

    try:
        found = json.loads((record / "result.json").read_text("utf-8"))["bundles"]
        return {str(name): str(path) for name, path in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"the run in {record} has no result yet") from None


def check(kind: ServedKind, settings: BundleSettings, choice: BundleChoice, host: str) -> None:
    """Everything that can be wrong, before anything is started."""
    from goldcrest.cluster.serving import model_options, read_token
    from goldcrest.cluster.serving_process import require_token

    require_token(host, settings.token_file)
    if settings.token_file is not None:
        read_token(settings.token_file)
        if settings.token_file.stat().st_mode & 0o077:
            warn(f"others on this machine can read {settings.token_file}: chmod 600")
    model_options(settings)
    kind.check(choice)


def write_serve_config(
    path: Path,
    kind: ServedKind,
    settings: BundleSettings,
    choice: BundleChoice,
    *,
    host: str,
    port: int,
) -> None:
    """The same endpoint as a file for `serve deploy`; its `user_config` is what can be swapped."""
    import yaml

    tree = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "goldcrest",
                "route_prefix": "/",
                "import_path": kind.import_path,
                "args": settings.model_dump(mode="json", exclude_defaults=True, exclude={"models"}),
                "deployments": [
                    {"name": name, "user_config": choice.model_dump(mode="json", exclude_none=True)}
                    for name in (kind.endpoint, kind.models)
                ],
            }
        ],
    }
    try:
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    say(f"{path}: deploy it with `serve deploy {path}`")

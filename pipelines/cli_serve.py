"""`goldcrest serve BUNDLE`: a bundle behind HTTP, in the foreground, until it is told to stop.

SIGINT and SIGTERM drain: new requests are answered 503, those inside are finished. SIGHUP looks at
the bundles again (a folder that was replaced, a run called `last`) and swaps them in.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.masking import mask_text
from goldcrest.pipelines.cli_common import (
    Answer,
    JsonOption,
    OverrideOption,
    ProfileOption,
    StoreOption,
    answering,
    find_run,
    open_store,
    say,
    warn,
    write_json,
)

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.cluster.serving_process import Serving
    from goldcrest.pipelines.endpoints.speaker import SpeakerSettings
    from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice

_POLL = 0.2  # seconds between two looks at what signals asked for
DEFAULT_STATE = ".goldcrest/serve"
MODELS, BUNDLES = "models.json", "bundles"  # in the state folder
MEMBERS = ("bundle.json", "model.safetensors", "calibration.json")


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
    """Serve a speaker bundle over HTTP: enrol, verify, identify, embed."""
    from goldcrest.cluster.config_file import load_config
    from goldcrest.pipelines.endpoints.speaker import SpeakerSettings

    with answering(json_file) as answer:
        least, most = _range(autoscale) if autoscale is not None else (replicas, None)
        settings = load_config(
            SpeakerSettings,
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
        choice = _choice(bundle, store, threshold, far)
        check(settings, choice, host)
        if write_config is not None:
            write_serve_config(write_config, settings, choice, host=host, port=port)
            answer.value = {"config": str(write_config)}
            return

        def look() -> ModelChoice:
            return _choice(bundle, store, threshold, far)

        foreground = _Foreground(answer, settings, look, json_file=json_file)
        foreground.run(_profile(profile), host=host, port=port, choice=choice)


def with_models_file(settings: SpeakerSettings) -> SpeakerSettings:
    """The settings with an absolute state folder, and replicas told of the file there that names
    their bundles: also where `-o state_folder=...` has moved it."""
    folder = settings.state_folder.absolute()
    models = {"file": str(folder / MODELS)}
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
) -> ModelChoice:
    """What the arguments name, looked up now."""
    from goldcrest.cluster.config_file import validate
    from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice
    from goldcrest.tasks.speaker.bundle import read_description

    folders: dict[str, str] = {}
    for given in bundles:
        name, equals, where = given.partition("=")
        folder = find_bundle(where if equals else given, store)
        name = name if equals else str(read_description(folder)["name"])
        if name in folders:
            raise InputError(f"two bundles are called '{name}'", hint="give them as NAME=BUNDLE")
        folders[name] = str(folder)
    tree = {"bundles": folders, "threshold": threshold, "far": far}
    return validate(ModelChoice, tree, where="the options")


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


def check(settings: SpeakerSettings, choice: ModelChoice, host: str) -> None:
    """Everything that can be wrong, before anything is started."""
    from goldcrest.cluster.serving import model_options, read_token
    from goldcrest.cluster.serving_process import require_token
    from goldcrest.pipelines.endpoints.speaker_calibration import read_calibration
    from goldcrest.tasks.speaker.bundle import read_description

    require_token(host, settings.token_file)
    if settings.token_file is not None:
        read_token(settings.token_file)
        if settings.token_file.stat().st_mode & 0o077:
            warn(f"others on this machine can read {settings.token_file}: chmod 600")
    model_options(settings)
    for folder in choice.bundles.values():
        system = str(read_description(folder)["name"])
        choice.threshold_of(folder, read_calibration(folder, system=system))


def write_serve_config(
    path: Path, settings: SpeakerSettings, choice: ModelChoice, *, host: str, port: int
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
                "import_path": "goldcrest.pipelines.endpoints.speaker:application",
                "args": settings.model_dump(mode="json", exclude_defaults=True, exclude={"models"}),
                "deployments": [
                    {"name": name, "user_config": choice.model_dump(mode="json", exclude_none=True)}
                    for name in ("SpeakerEndpoint", "SpeakerModels")
                ],
            }
        ],
    }
    try:
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    say(f"{path}: deploy it with `serve deploy {path}`")


# ---------------------------------------------------------------------------------- foreground


class _Foreground:
    """The endpoint from its start to its end, as signals steer it."""

    def __init__(
        self,
        answer: Answer,
        settings: SpeakerSettings,
        look: Any,
        *,
        json_file: Path | None,
    ) -> None:
        self._answer = answer
        self._settings = settings
        self._look = look
        self._json_file = json_file

    def run(self, profile: Profile, *, host: str, port: int, choice: ModelChoice) -> None:
        """Serve until SIGINT or SIGTERM."""
        from goldcrest.cluster.serving_process import check_room, serving
        from goldcrest.pipelines.endpoints.speaker import application

        began = time.monotonic()
        for of_the_dead in ("metrics", BUNDLES):
            shutil.rmtree(self._settings.state_folder / of_the_dead, ignore_errors=True)
        with serving(profile, host=host, port=port) as running, _signals() as asked:
            check_room(self._settings.replicas, cpus=self._settings.cpus, gpus=self._settings.gpus)
            self._write(self._take(choice))
            running.deploy(application(self._settings))
            self._tell(running, choice, time.monotonic() - began)
            while "stop" not in asked:
                if "reload" in asked:
                    asked.discard("reload")
                    self._swap(running)
                time.sleep(_POLL)
            say("stopping: requests inside are finished", error=True)
            left = running.drain("SpeakerEndpoint", self._settings.drain_seconds)
            if left:
                warn(f"{left} requests took too long and were cut off")

    def _take(self, choice: ModelChoice) -> ModelChoice:
        """The same choice with copies of the bundles: what is served does not change, and cannot
        be cleaned away, while a replica might have to load it again."""
        from goldcrest.pipelines.endpoints.speaker_models import fingerprint, model_id

        kept = {}
        for name, folder in choice.bundles.items():
            kept[name] = self._settings.state_folder / BUNDLES / fingerprint(model_id(folder))
            kept[name].mkdir(mode=0o700, parents=True, exist_ok=True)
            for member in MEMBERS:
                if (folder / member).is_file():
                    shutil.copyfile(folder / member, kept[name] / member)
        return choice.model_copy(update={"bundles": kept})

    def _write(self, choice: ModelChoice) -> None:
        """Where replicas look for their bundles, also those that start after a crash."""
        path = self._settings.state_folder / MODELS
        temporary = path.with_suffix(".tmp")
        temporary.write_text(choice.model_dump_json(), encoding="utf-8")
        temporary.replace(path)

    def _tell(self, running: Serving, choice: ModelChoice, seconds: float) -> None:
        self._answer.value = {
            "url": running.url,
            "pid": os.getpid(),
            "models": {name: str(folder) for name, folder in choice.bundles.items()},
            "seconds": round(seconds, 3),
        }
        if self._json_file is not None:
            write_json(self._json_file, self._answer.value)
        say(f"serving {', '.join(choice.bundles)} at {running.url} (API: {running.url}/docs)")
        if self._settings.demo:
            say(f"try it: {running.url}/demo")

    def _swap(self, running: Serving) -> None:
        """Take the bundles as they are now into service; on any error the old ones stay."""
        try:
            choice = self._look()
            check(self._settings, choice, running.host)
            taken = self._take(choice)
            preload(running, taken)
            self._write(taken)
            running.everywhere("SpeakerEndpoint", "reload", seconds=120)
        except (GoldcrestError, OSError) as error:
            warn(f"the models stay as they were: {mask_text(str(error))}")
        else:
            say(f"now serving {', '.join(choice.bundles)}")


def preload(running: Serving, choice: ModelChoice) -> None:
    """Load the bundles in every replica of the model; an error in words if one cannot be."""
    for folder in choice.bundles.values():
        facts, *_ = running.everywhere("SpeakerModels", "describe", str(folder), seconds=60)
        running.everywhere("SpeakerModels", "load", facts["model"], seconds=120)


@contextmanager
def _signals() -> Iterator[set[str]]:
    """What signals have asked for: `stop`, `reload`."""
    asked: set[str] = set()
    wanted = {signal.SIGINT: "stop", signal.SIGTERM: "stop", signal.SIGHUP: "reload"}
    before = {
        number: signal.signal(number, lambda *_, what=what: asked.add(what))
        for number, what in wanted.items()
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

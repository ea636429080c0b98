"""An endpoint in the foreground, from its start to its end, as signals steer it.

What is served are copies of the bundles, under their fingerprints in the scratch folder of the
state folder: a bundle that is replaced or cleaned away while a replica might have to load it again
changes nothing. The state folder is one server's at a time: another would delete the copies that
this one may need. Nothing but the scratch folder is ever deleted there.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.masking import mask_text
from goldcrest.cluster.serving_process import Serving, check_room, serving
from goldcrest.pipelines.cli_common import Answer, say, warn, write_json
from goldcrest.pipelines.endpoints.bundles import MODELS, fingerprint

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.pipelines.endpoints.bundles import BundleChoice, BundleSettings, ServedKind

_POLL = 0.2  # seconds between two looks at what signals asked for
BUNDLES = "bundles"  # in the scratch folder
METRICS = "metrics"  # in the scratch folder
LOCK = "serve.lock"  # in the state folder: locked by its server, whose process id it holds


class Foreground:
    """One `goldcrest serve`."""

    def __init__(
        self,
        answer: Answer,
        kind: ServedKind,
        settings: BundleSettings,
        look: Callable[[], BundleChoice],
        *,
        json_file: Path | None,
    ) -> None:
        """`look` finds the bundles that the command line names as they are when it is called, and
        raises InputError where they can't be served."""
        self._answer = answer
        self._kind = kind
        self._settings = settings
        self._look = look
        self._json_file = json_file
        self._copies = settings.scratch_folder / BUNDLES
        self._serving: BundleChoice  # copies of the bundles that were last taken into service
        self._before: BundleChoice  # and of those before: requests keep the model they began with

    def run(self, profile: Profile, *, host: str, port: int, choice: BundleChoice) -> None:
        """Serve until SIGINT or SIGTERM; InputError where another server has the state folder."""
        began = time.monotonic()
        self._check_apart(choice)
        with (
            held(self._settings.state_folder),
            serving(profile, host=host, port=port) as running,
            _signals() as asked,
        ):
            check_room(self._settings.replicas, cpus=self._settings.cpus, gpus=self._settings.gpus)
            shutil.rmtree(self._settings.scratch_folder, ignore_errors=True)  # of a dead server
            self._settings.scratch_folder.mkdir(mode=0o700, exist_ok=True)
            self._serving = self._before = self._take(choice)
            self._write(self._serving)
            running.deploy(self._kind.application(self._counting_in_scratch()))
            self._tell(running, choice, time.monotonic() - began)
            while "stop" not in asked:
                if "reload" in asked:
                    asked.discard("reload")
                    self._swap(running)
                time.sleep(_POLL)
            say("stopping: requests inside are finished", error=True)
            left = running.drain(self._kind.endpoint, self._settings.drain_seconds)
            if left:
                warn(f"{left} requests took too long and were cut off")

    def _counting_in_scratch(self) -> BundleSettings:
        """The settings with metrics in the folder that every start empties, if none is given."""
        folder = self._settings.metrics_folder or self._settings.scratch_folder / METRICS
        return self._settings.model_copy(update={"metrics_folder": folder})

    def _check_apart(self, choice: BundleChoice) -> None:
        """InputError where a bundle lies in the folder that this server deletes from."""
        scratch = self._settings.scratch_folder.resolve()
        for folder in choice.bundles.values():
            for member in self._kind.members(folder):
                if (folder / member).resolve().is_relative_to(scratch):
                    raise InputError(
                        f"the bundle {folder} lies in {scratch}, which `goldcrest serve` empties",
                        hint="serve the bundle that it is a copy of, or copy it elsewhere first",
                    )

    def _take(self, choice: BundleChoice) -> BundleChoice:
        """The same choice with copies of the bundles."""
        kept = {}
        for name, folder in choice.bundles.items():
            content = fingerprint(self._kind.identity(folder))
            kept[name] = self._copies / content
            for member in self._kind.members(folder):
                _copy(folder / member, kept[name] / member)
        return choice.model_copy(update={"bundles": kept})

    def _tidy(self) -> None:
        """Delete the copies of bundles that are neither in service nor were just before."""
        wanted = {*self._serving.bundles.values(), *self._before.bundles.values()}
        for copy in self._copies.glob("*"):
            if copy not in wanted:
                shutil.rmtree(copy, ignore_errors=True)

    def _write(self, choice: BundleChoice) -> None:
        """Where replicas look for their bundles, also those that start after a crash."""
        path = self._settings.scratch_folder / MODELS
        temporary = path.with_suffix(".tmp")
        temporary.write_text(choice.model_dump_json(), encoding="utf-8")
        temporary.replace(path)

    def _tell(self, running: Serving, choice: BundleChoice, seconds: float) -> None:
        self._answer.value = {
            "url": running.url,
            "pid": os.getpid(),
            "models": {name: str(folder) for name, folder in choice.bundles.items()},
            "seconds": round(seconds, 3),
        }
        if self._json_file is not None:
            write_json(self._json_file, self._answer.value)
        api, token = f"{running.url}/docs", self._settings.token_file
        if token is not None:  # which a browser can't send
            path = shlex.quote(str(token))
            api = f'curl -H "Authorization: Bearer $(cat {path})" {api} > docs.html'
        say(f"serving {', '.join(choice.bundles)} at {running.url} (API: {api})")
        if self._settings.demo:
            say(f"try it: {running.url}/demo")

    def _swap(self, running: Serving) -> None:
        """Take the bundles as they are now into service; on any error the old ones stay."""
        try:
            choice = self._look()
            self._check_apart(choice)
            taken = self._take(choice)
            self._preload(running, taken)
            self._write(taken)
        except (GoldcrestError, OSError) as error:
            warn(f"the models stay as they were: {mask_text(str(error))}")
            self._tidy()
            return
        try:
            self._reload(running)
        except GoldcrestError as error:
            self._swap_back(running, error)
        else:
            self._before, self._serving = self._serving, taken
            self._tidy()
            say(f"now serving {', '.join(choice.bundles)}")

    def _swap_back(self, running: Serving, why: GoldcrestError) -> None:
        """The old bundles again, also in those HTTP replicas that have taken the new ones."""
        reason = mask_text(str(why))
        try:
            self._write(self._serving)
            self._reload(running)
        except (GoldcrestError, OSError) as error:
            warn(
                f"the swap failed ({reason}), and so did the way back ({mask_text(str(error))}): "
                "replicas may serve the old models or the new ones; send SIGHUP again, or start "
                "this server anew"
            )
        else:
            warn(f"the models are again those from before: {reason}")

    def _reload(self, running: Serving) -> None:
        """Have every HTTP replica take the models that are written down."""
        running.everywhere(self._kind.endpoint, "reload", seconds=120)

    def _preload(self, running: Serving, choice: BundleChoice) -> None:
        """Load the bundles in every replica of the model; an error in words if one cannot be."""
        models = self._kind.models
        for folder in choice.bundles.values():
            facts, *_ = running.everywhere(models, "describe", str(folder), seconds=60)
            running.everywhere(models, "load", facts["model"], seconds=120)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The state folder, made if need be, as this process's alone; InputError if another has it.

    The system lets go of the lock when its holder ends, however it ends.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unusable(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(32).strip() or "unknown"
            raise InputError(
                f"another `goldcrest serve` (process {holder}) uses the state folder {folder}",
                hint="stop that one, or give this one a folder of its own with --state DIR",
            ) from None
        except OSError as error:
            raise _unusable(folder, error) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"the state folder {folder} cannot be used: {error.strerror}",
        hint="choose another with --state DIR, on a local disk",
    )


def _copy(source: Path, target: Path) -> None:
    """Copy by renaming: replicas may have the file that is replaced mapped into their memory."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


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

"""Start Ray or join one, as a cluster profile says, and leave it again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.ray_token import use_token_if_there, warn_if_open

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile, RayConfig

Mode = Literal["attached", "joined", "started"]
"""How this process came to its Ray: it had one, it joined one that ran, it started its own."""

_MONITOR = "autoscaler/_private/monitor.py"


def attach(profile: Profile) -> Mode:
    """Connect this process to Ray as the profile says; `leave` undoes it.

    Inside a Ray job that is the job's own cluster, whatever the profile's address.
    """
    import ray

    if ray.is_initialized():
        return "attached"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # its warnings may go to a file
    os.environ.setdefault("RAY_task_oom_retries", "2")  # its default is to try for ever
    wanted = profile.ray
    address = "auto" if inside_job() else wanted.address
    arguments: dict[str, Any] = {"address": address, "logging_level": "ERROR"}
    if wanted.runtime_env:
        arguments["runtime_env"] = wanted.runtime_env
    local = address == "local"
    if local:
        warn_if_open()
        arguments |= _local_arguments(wanted)
    else:
        use_token_if_there()
    try:
        _start(arguments, tries=2 if local else 1)
    except ray.exceptions.AuthenticationError as error:
        raise InputError(
            f"the Ray at '{address}' wants another token, or one at all (cluster profile "
            f"'{profile.name}')",
            hint="put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH",
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"no Ray answers at '{address}' (cluster profile '{profile.name}'): {error}",
            hint="start it with `ray start --head`, or use the profile laptop",
        ) from None
    return "started" if local else "joined"


def leave(mode: Mode) -> None:
    """Undo `attach`: end the Ray that it started, or let go of the one that it joined."""
    import ray

    if mode == "attached":
        return
    if mode == "started":
        _end_autoscaler()
    ray.shutdown()


def _end_autoscaler() -> None:
    """Kill the local Ray's autoscaler, which has nothing to scale.

    It does not heed SIGTERM: `ray.shutdown` waits a second for it before it kills it too.
    """
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(part.endswith(_MONITOR) for part in child.cmdline()):
                child.kill()


def inside_job() -> bool:
    """Whether this process is the command of a Ray job: a second Ray here would never be meant."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _start(arguments: Mapping[str, Any], tries: int) -> None:
    """`ray.init`, which gives up after 30 s where the machine is busy: one more try, then words."""
    import ray

    try:
        ray.init(log_to_driver=False, **arguments)
    except Exception as error:
        if "timed out" not in str(error):  # Ray raises a bare Exception: its text is all there is
            raise
        ray.shutdown()
        if tries > 1:
            return _start(arguments, tries - 1)
        reason = next(iter(str(error).splitlines()), "")
        raise GoldcrestError(
            f"Ray did not start in time: {reason}",
            hint="the machine may be too busy or short of memory; try again when it is calmer",
        ) from error


def _local_arguments(wanted: RayConfig) -> dict[str, Any]:
    given: Mapping[str, Any] = {
        "num_cpus": wanted.num_cpus,
        "num_gpus": wanted.num_gpus,
        "resources": wanted.resources or None,
        "labels": wanted.labels or None,
        "object_store_memory": wanted.object_store_memory,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    return {**arguments, "include_dashboard": wanted.dashboard, "dashboard_host": "127.0.0.1"}

"""A Serve application in the foreground: start it, follow it, swap its models, drain, stop."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.ray_session import attach, leave
from goldcrest.cluster.serving_gate import is_loopback

APPLICATION = "goldcrest"
_PROXY = "SERVE_PROXY_ACTOR"  # how the names of Serve's proxies begin
_LAST_ANSWERS = 0.5  # seconds for answers that have left a replica to pass the proxy
_CLOSING = 2.0  # seconds for the port to close


class Serving:
    """An application that answers at `url`."""

    def __init__(self, *, host: str, port: int) -> None:
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        """Where it answers, as this machine can call it."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"

    def deploy(self, application: Any) -> None:
        """Start the application and wait until it answers."""
        from ray import serve

        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise GoldcrestError(f"the endpoint did not start: {reason_of(error)}") from error

    def handle(self, deployment: str) -> Any:
        """A handle to one of the application's deployments."""
        from ray import serve

        return serve.get_deployment_handle(deployment, APPLICATION)

    def everywhere(self, deployment: str, method: str, *values: Any, seconds: float) -> list[Any]:
        """Call a method of every replica of a deployment; GoldcrestError if one fails or hangs."""
        from ray.exceptions import RayError

        try:
            answers = self.handle(deployment).broadcast(method, *values)
            return list(answers.results(timeout_s=seconds))
        except (RayError, TimeoutError) as error:
            raise GoldcrestError(f"{deployment}.{method} failed: {reason_of(error)}") from None

    def drain(self, endpoint: str, seconds: float) -> int:
        """Turn new requests away and wait for those inside; the number that were left."""
        left = sum(self.everywhere(endpoint, "drain", seconds, seconds=seconds + 10.0))
        time.sleep(_LAST_ANSWERS)
        return left


@contextmanager
def serving(profile: Profile, *, host: str, port: int) -> Iterator[Serving]:
    """Serve's HTTP proxy at `host:port`, on the profile's Ray; stopped at the end.

    InputError where that Ray serves already: it has one proxy, and its address is taken.
    """
    port = free_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    mode = attach(profile)
    from ray import serve

    try:
        if mode != "started" and serve.status().proxies:
            raise InputError(
                "this Ray serves applications already",
                hint="write a file with --write-config and deploy it with `serve deploy`",
            )
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        try:
            yield Serving(host=host, port=port)
        finally:
            try:
                _close_port(host, port)
            finally:
                serve.shutdown()
    finally:
        if mode == "started":
            leave(mode)


def _close_port(host: str, port: int) -> None:
    """End Serve's proxy, and wait until its port refuses connections.

    `serve.shutdown` by itself takes the application away while the proxy may still listen: it then
    answers 404, which callers take for the last word, where a refused connection is tried again.
    """
    import ray
    from ray.util import list_named_actors

    for actor in list_named_actors(all_namespaces=True):
        if actor["name"].startswith(_PROXY):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
            except ValueError:
                continue  # it has just ended
    ends = time.monotonic() + _CLOSING
    while time.monotonic() < ends:
        try:
            socket.create_connection((host, port), timeout=_CLOSING).close()
        except OSError:
            return
        time.sleep(0.02)


def check_room(replicas: int, *, cpus: float, gpus: float) -> None:
    """InputError where a Ray of this machine's size would wait for ever to place the replicas."""
    import ray

    total = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if replicas * each > total.get(name, 0.0):
            raise InputError(
                f"{replicas} replicas with {each:g} {name} each; this Ray has "
                f"{total.get(name, 0.0):g}",
                hint="fewer --replicas, or a share of a core each: -o cpus=0.5",
            )


def free_port(host: str, port: int) -> int:
    """`port` if it is free on `host`, any free one for 0; InputError in words otherwise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"cannot listen on {host}:{port}: {reason}",
                hint="choose another --port, or 0 for any that is free",
            ) from None
        return int(probe.getsockname()[1])


def require_token(host: str, token_file: Any) -> None:
    """Beyond this machine, nothing is served without a token."""
    if token_file is None and not is_loopback(host):
        raise InputError(
            f"'{host}' is reached from other machines: a token is required",
            hint="openssl rand -hex 32 > token; goldcrest serve ... --token-file token",
        )


def reason_of(error: BaseException) -> str:
    """The last line that says something of Serve's long account of a failed deployment."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(":")[0]]
    return (named or lines or [type(error).__name__])[-1][:500]

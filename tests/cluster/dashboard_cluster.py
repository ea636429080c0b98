"""A Ray cluster with a dashboard in a process of its own, for tests of jobs and of its doors.

    python dashboard_cluster.py CPUS  ->  one line of JSON: {"dashboard", "gcs"}

It lives until its standard input closes. It asks for this user's Ray token, which is made if there
is none. Every port is one that was free a moment before: two clusters on one machine must not share
an agent's port.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DashboardCluster:
    """Where a cluster is reached: its dashboard's URL, and `host:port` of its GCS."""

    dashboard: str
    gcs: str


def user_environment(**more: str) -> dict[str, str]:
    """The environment of somebody who holds the token and has the tests' Python on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "RAY_AUTH_MODE": "token", "PATH": path, **more}


@contextlib.contextmanager
def dashboard_cluster(cpus: int = 2) -> Iterator[DashboardCluster]:
    """A cluster of one node, ended with the block."""
    with subprocess.Popen(
        [sys.executable, __file__, str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=user_environment(RAY_raylet_start_wait_time_s="180"),  # on a busy machine
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, process.communicate()[1][-3000:]
            facts = json.loads(line)
            yield DashboardCluster(facts["dashboard"], facts["gcs"])
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """Start, say where, wait for the end of the input, end."""
    import ray
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(create_token_if_missing=True)  # `Cluster` alone makes none
    dashboard, agent = free_ports(2)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": int(sys.argv[1]),
            "object_store_memory": 100 << 20,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard,
            "dashboard_agent_listen_port": agent,
        },
    )
    cluster.wait_for_nodes()
    facts = {"dashboard": f"http://127.0.0.1:{dashboard}", "gcs": cluster.address}
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    cluster.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()

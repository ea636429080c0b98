"""The doctor at Ray: does it start, and does every Ray that runs here ask for a token?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goldcrest.cluster.doctor_finding import Check, finish, start_child

_RAY = """
import json, os, sys, time, ray
started = time.perf_counter()
where = sys.argv[1]
if where:
    from goldcrest.cluster.ray_token import use_token_if_there
    use_token_if_there()
options = dict(include_dashboard=False, num_cpus=1, object_store_memory=80 << 20)
ray.init(address=where or "local", log_to_driver=False, logging_level="ERROR",
         **({} if where else options))
begun = time.perf_counter() - started
answer = ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote(), timeout=60)
print(json.dumps({"version": ray.__version__, "start": begun, "answer": answer,
                  "nodes": len([n for n in ray.nodes() if n["Alive"]]),
                  "resources": {k: v for k, v in ray.cluster_resources().items()
                                if k in ("CPU", "GPU")},
                  "gcs": ray.get_runtime_context().gcs_address}), flush=True)
sys.stdin.readline()  # stay until the parent has knocked at the door
ray.shutdown()
"""

# A stranger's knock: no token, as from another machine. A guarded cluster turns it away.
_KNOCK = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
    print("open")
except Exception as error:
    print("closed" if type(error).__name__ == "AuthenticationError" else f"unknown: {error}")
"""


def check_ray(address: str | None) -> Check:
    """Ray starts (or is reached at `address`), runs a task, and turns strangers away."""
    if address and address.startswith(("http://", "https://")):
        return _check_dashboard(address)
    what = f"Ray at {address}" if address else "starting Ray"
    child = start_child(_RAY, address or "")
    assert child.stdout is not None
    try:
        line = _first_json(child.stdout)
        state = knock(json.loads(line)["gcs"]) if line else ""
        _, reason = finish(child, what)
    finally:
        if child.poll() is None:
            child.kill()
    if not line:
        return Check(name="ray", status="failure", detail=reason or f"{what} said nothing")
    facts = json.loads(line)
    size = ", ".join(f"{count:g} {name}" for name, count in sorted(facts["resources"].items()))
    detail = (
        f"ray {facts['version']}: {facts['nodes']} node(s), {size}, up in {facts['start']:.1f} s"
    )
    if state == "open":
        return _open_cluster(detail)
    if state != "closed":
        return Check(name="ray", status="warning", detail=f"{detail}; token check: {state}")
    return Check(name="ray", status="ok", detail=f"{detail}; strangers are turned away (token)")


def _open_cluster(detail: str, name: str = "ray") -> Check:
    return Check(
        name=name,
        status="failure",
        detail=f"{detail}; this cluster runs anybody's code: it asks for no token",
        hint="stop it, and start it with RAY_AUTH_MODE=token; a firewall alone is no lock",
    )


def other_clusters(address: str | None) -> tuple[str, ...]:
    """Where Ray runs on this machine already, and what RAY_ADDRESS names, but for `address`."""
    import psutil

    found = {os.environ.get("RAY_ADDRESS", "")} - {"", "auto", "local"}
    flag = "--gcs-address="
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if Path(words[0]).name == "raylet":
            found |= {word.removeprefix(flag) for word in words if word.startswith(flag)}
    return tuple(sorted(found - {address}))


def check_doors(addresses: Sequence[str]) -> Check:
    """No Ray that runs already lets strangers in: a run may join it, and others reach it."""
    from goldcrest.cluster.ray_token import knock_at_dashboard

    states = {
        each: knock_at_dashboard(each) if each.startswith(("http://", "https://")) else knock(each)
        for each in addresses
    }
    if opened := [each for each, state in states.items() if state == "open"]:
        return _open_cluster(f"Ray at {', '.join(opened)}", name="doors")
    if unknown := [f"{each}: {s}" for each, s in states.items() if s != "closed"]:
        return Check(name="doors", status="warning", detail=f"Ray at {'; '.join(unknown)}")
    if not states:
        return Check(name="doors", status="ok", detail="no other Ray runs here")
    detail = f"Ray at {', '.join(states)}: strangers are turned away (token)"
    return Check(name="doors", status="ok", detail=detail)


def _check_dashboard(url: str) -> Check:
    from goldcrest.cluster.ray_token import knock_at_dashboard

    detail, state = f"dashboard at {url}", knock_at_dashboard(url)
    if state == "open":
        return _open_cluster(detail)
    if state == "closed":
        return Check(name="ray", status="ok", detail=f"{detail}: strangers are turned away (token)")
    hint = "give --address the URL of a Ray dashboard, or host:port of a Ray head"
    return Check(name="ray", status="failure", detail=f"{detail}: {state}", hint=hint)


def _first_json(stream: Any) -> str:
    for line in stream:
        if line.startswith("{"):
            return str(line)
    return ""


def knock(gcs_address: str) -> str:
    """`open`, `closed` or why that is unknown: what a client without a token is told."""
    child = start_child(_KNOCK, gcs_address, RAY_AUTH_MODE="disabled")
    line, reason = finish(child, "the check for an open cluster")
    return line or reason

"""What an endpoint costs: time to the first answer, overhead over a direct call, load by clients.

Everything on one machine, clients included: quote it with the load average, which is printed. The
direct call decodes and embeds the same file in this process, on one thread, as a replica does. The
short form asks the server of the other tests a few times; its numbers say little.
"""

from __future__ import annotations

import io
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from goldcrest.tasks.data.audio import decode
from goldcrest.tasks.speaker.bundle import load_bundle
from tests.pipelines.speaker_server import Server, make_bundle, start_server, voice

TOKEN = "a-token-of-the-tests-3f9c1b"


def milliseconds(call: Callable[[], object], times: int) -> list[float]:
    """Sorted durations of repeated calls, after three to warm up."""
    for _ in range(3):
        call()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return sorted(found)


def show(name: str, found: list[float]) -> None:
    """One line: p50, p95, p99."""
    p50, p95, p99 = (found[min(len(found) - 1, int(len(found) * q))] for q in (0.5, 0.95, 0.99))
    load = os.getloadavg()[0]
    print(f"{name:34s} p50 {p50:7.1f}  p95 {p95:7.1f}  p99 {p99:7.1f} ms   load {load:.0f}")


class Client:
    """A connection that stays open, as a real client's would."""

    def __init__(self, server: Server) -> None:
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {server.token}"
        self._url = server.url

    def embed(self, recording: bytes) -> int:
        """POST /embed; its status."""
        answer = self._session.post(
            self._url + "/embed", files={"audio": io.BytesIO(recording)}, timeout=60
        )
        return answer.status_code

    def health(self) -> int:
        """GET /healthz: what Serve's proxy and the gate cost without a model."""
        return self._session.get(self._url + "/healthz", timeout=60).status_code


def under_load(server: Server, recording: bytes, clients: int, seconds: float) -> dict[int, int]:
    """`clients` connections that ask again as soon as they are answered; answers by status."""
    found: list[float] = []
    statuses: dict[int, int] = {}
    lock, ends = threading.Lock(), time.monotonic() + seconds

    def client(_: int) -> None:
        line = Client(server)
        while time.monotonic() < ends:
            began = time.perf_counter()
            status = line.embed(recording)
            took = 1000 * (time.perf_counter() - began)
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                if status == 200:
                    found.append(took)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    show(f"{clients} clients, {len(found) / seconds:.1f} answers/s", sorted(found))
    print(f"{'':34s} statuses {statuses}")
    assert set(statuses) <= {200, 503}
    return statuses


def overhead(server: Server, bundle: Path, recording: bytes, times: int) -> None:
    """Show what HTTP, Serve and the gate add to a direct call of the model."""
    model = load_bundle(bundle)
    direct = milliseconds(lambda: model.embed_waveform(decode(recording)), times)
    line = Client(server)
    health = milliseconds(line.health, times)
    served = milliseconds(lambda: line.embed(recording), times)
    show("direct call", direct)
    show("GET /healthz (proxy and gate)", health)
    show("POST /embed, one client", served)
    more = statistics.median(served) - statistics.median(direct)
    print(f"overhead p50 {more:.1f} ms")


def test_overhead_and_load_in_short(speaker_server: Server) -> None:
    """The same measurements; what is asked of them is that every request was answered."""
    recording = voice(100)
    overhead(speaker_server, speaker_server.folder / "one", recording, times=5)
    for clients in (4, 16, 64):
        statuses = under_load(speaker_server, recording, clients, 1.0)
        # Two doors let 16 in each: only beyond that may anybody be turned away.
        assert statuses[200] >= clients or (clients > 16 and statuses[200] >= 16), statuses
        assert clients > 16 or set(statuses) == {200}, statuses


@pytest.mark.slow
def test_overhead_and_load(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "one")
    profile = tmp_path / "profile.yaml"
    profile.write_text("ray: {num_cpus: 2, object_store_memory: 100MB}")
    began = time.perf_counter()
    server = start_server(tmp_path, str(bundle), "--profile", str(profile), token=TOKEN)
    up = time.perf_counter() - began
    recording = voice(100, seconds=3)
    assert Client(server).embed(recording) == 200
    first = time.perf_counter() - began
    print(
        f"\nfirst answer {first:.1f} s after the command ({up:.1f} s until it says that it serves)"
    )
    overhead(server, bundle, recording, times=100)
    for clients in (4, 16, 64):
        under_load(server, recording, clients, 10.0)
    assert server.stop() == 0

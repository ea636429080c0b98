"""A served bundle under load while things break: replicas die, clients vanish, models are swapped.

The server is `goldcrest serve` with two HTTP replicas and two of the model. The short form runs
each fault once, and twenty seconds of load without one; the long form (`slow`) drains under load
and soaks for ten minutes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests

from tests.pipelines.speaker_server import Server, make_bundle, start_server, voice


class Load:
    """Clients that verify two recordings again and again, and what they were answered.

    With `heavy` each request holds as much speech as fits into a body, so that the model always has
    requests inside.
    """

    def __init__(self, server: Server, clients: int, heavy: bool) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.scores: set[float] = set()
        self.stop = threading.Event()
        self._server = server
        self._lock = threading.Lock()
        seconds, count = (9, 3) if heavy else (1, 1)
        self._form = {"speaker": "heavy"} if heavy else {}
        self._recordings = [voice(100, seconds=seconds)] * count + [
            voice(200, seconds=seconds)
        ] * count
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self) -> None:
        while not self.stop.is_set():
            try:
                answer = self._server.post("/verify", *self._recordings, **self._form)
                found: int | str = answer.status_code
            except requests.RequestException as error:
                found = type(error).__name__
            with self._lock:
                self.statuses[found] += 1
                if found == 200:
                    self.scores.add(round(answer.json()["score"], 4))
                elif found == "ConnectionError":
                    self.stop.set()  # the server is gone

    def wait_for(self, more: int, seconds: float = 60.0) -> None:
        """Wait until `more` further requests were answered 200."""
        goal, limit = self.statuses[200] + more, time.monotonic() + seconds
        while self.statuses[200] < goal:
            assert time.monotonic() < limit, self.statuses
            time.sleep(0.05)

    def finish(self) -> Counter[int | str]:
        """Stop the clients; how often each status was answered."""
        self.stop.set()
        for thread in self._threads:
            thread.join(90)
        return self.statuses


@contextmanager
def load(server: Server, clients: int = 4, *, heavy: bool = False) -> Iterator[Load]:
    """Load that ends with the block."""
    made = Load(server, clients, heavy)
    try:
        yield made
    finally:
        made.finish()


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.2)


def resident(server: Server) -> int:
    """Bytes that all processes of a server hold in memory."""
    total = 0
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            total += each.memory_info().rss
    return total


def check_memory_holds(server: Server, seconds: float) -> None:
    """All of four clients' requests are answered, and the processes' resident memory does not grow:
    in the last third of the time it lies at most 5 % above that of the middle one."""
    sizes = []
    with load(server) as under:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(seconds / 120)
            sizes.append(resident(server))
    third = len(sizes) // 3
    middle, last = (sum(part) / third for part in (sizes[third : 2 * third], sizes[-third:]))
    print(f"{under.statuses[200]} requests; {middle / 2**20:.0f} -> {last / 2**20:.0f} MiB")
    assert set(under.statuses) == {200}
    assert last < 1.05 * middle


@pytest.mark.scenario("twenty seconds of load; all is answered, memory does not grow")
def test_steady_load_is_answered_and_does_not_grow(speaker_server: Server) -> None:
    check_memory_holds(speaker_server, 20)


@pytest.mark.scenario("a replica that holds the model is killed under load; no request fails")
def test_a_killed_model_replica_costs_no_request(speaker_server: Server) -> None:
    """Embedding changes nothing, so the HTTP side asks again; the user sees no fault."""
    speaker_server.post("/enroll", voice(150), speaker="heavy")
    with load(speaker_server, 6, heavy=True) as under:
        under.wait_for(10)
        both = speaker_server.replicas("SpeakerModels")
        assert len(both) == 2
        victim = max(both, key=lambda pid: psutil.Process(pid).cpu_times().user)  # the busier
        os.kill(victim, signal.SIGKILL)
        under.wait_for(20)
    speaker_server.call("DELETE", "/speakers/heavy")
    assert set(under.statuses) == {200}
    assert len(under.scores) == 1
    wait_until(lambda: len(speaker_server.replicas("SpeakerModels")) == 2)
    assert victim not in speaker_server.replicas("SpeakerModels")


@pytest.mark.scenario(
    "a replica that answers HTTP is killed under load; only its own requests fail"
)
def test_a_killed_http_replica_costs_what_was_inside_it(speaker_server: Server) -> None:
    speaker_server.post("/enroll", voice(100), speaker="anna")
    clients = 4
    with load(speaker_server, clients) as under:
        under.wait_for(20)
        os.kill(speaker_server.replicas("SpeakerEndpoint")[0], signal.SIGKILL)
        under.wait_for(40)
    lost = sum(under.statuses.values()) - under.statuses[200]
    assert lost <= clients, under.statuses
    assert set(under.statuses) <= {200, 500, 503}
    wait_until(lambda: len(speaker_server.replicas("SpeakerEndpoint")) == 2)
    for _ in range(8):  # the new replica has the models and the enrolments of the old one
        answer = speaker_server.post("/verify", voice(100), speaker="anna")
        assert answer.json()["score"] == pytest.approx(1.0, abs=1e-4)
    speaker_server.call("DELETE", "/speakers/anna")


@pytest.mark.scenario("ten times the capacity at once; answered, or 503 with Retry-After")
def test_a_burst_is_served_or_turned_away(speaker_server: Server) -> None:
    """Ten times what the gates let in (16 in each of two replicas), all at once."""
    recording = voice(100, seconds=3)
    with ThreadPoolExecutor(160) as pool:
        answers = list(pool.map(lambda _: speaker_server.post("/embed", recording), range(320)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[200] >= 16
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
    assert speaker_server.post("/embed", recording).status_code == 200


@pytest.mark.scenario("a model is swapped under load; no request fails")
def test_models_are_swapped_under_load_without_a_failed_request(speaker_server: Server) -> None:
    folder = speaker_server.folder
    new, old = make_bundle(folder / "new", seed=7), folder / "one"
    before = speaker_server.call("GET", "/models").json()["models"][0]["fingerprint"]
    seen = speaker_server.log().count("now serving")
    try:
        with load(speaker_server) as under:
            under.wait_for(20)
            old.rename(folder / "kept")
            new.rename(folder / "one")
            speaker_server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: speaker_server.log().count("now serving") > seen)
            under.wait_for(20)
        assert set(under.statuses) == {200}
        assert len(under.scores) == 2  # of the old model and of the new one, and of no mixture
        after = speaker_server.call("GET", "/models").json()["models"][0]["fingerprint"]
        assert after != before
    finally:
        (folder / "one").rename(folder / "new")
        (folder / "kept").rename(folder / "one")
        speaker_server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: speaker_server.log().count("now serving") > seen + 1)
    again = speaker_server.call("GET", "/models").json()["models"][0]["fingerprint"]
    assert again == before


def test_a_bad_bundle_is_not_taken_into_service(speaker_server: Server) -> None:
    bundle = speaker_server.folder / "one" / "model.safetensors"
    content = bundle.read_bytes()
    try:
        bundle.write_bytes(content[: len(content) // 2])
        speaker_server.process.send_signal(signal.SIGHUP)
        speaker_server.wait_for_log("the models stay as they were")
        assert speaker_server.post("/embed", voice(100)).status_code == 200
    finally:
        bundle.write_bytes(content)
    assert "model.safetensors can't be read" in speaker_server.log()


@pytest.mark.scenario("40 clients hang up before the answer; nothing stays behind")
def test_clients_that_vanish_leave_no_request_inside(speaker_server: Server) -> None:
    def vanish(_: int) -> None:
        with pytest.raises(requests.RequestException):
            requests.post(
                speaker_server.url + "/embed",
                headers={"Authorization": f"Bearer {speaker_server.token}"},
                files={"audio": voice(100, seconds=9)},
                timeout=(5, 0.002),
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(vanish, range(40)))

    def inside() -> float:
        lines = speaker_server.call("GET", "/metrics").text.splitlines()
        (value,) = [x for x in lines if x.startswith("goldcrest_requests_in_progress ")]
        return float(value.split()[1])

    wait_until(lambda: inside() == 1.0, 60)  # the one that asks


# ---------------------------------------------------------------------------------- long form


def own_server(folder: Path, *more: str) -> Server:
    """A server of the test's own."""
    bundle = make_bundle(folder / "one")
    profile = folder / "profile.yaml"
    profile.write_text("ray: {num_cpus: 2, object_store_memory: 100MB}")
    token = "a-token-of-the-tests-3f9c1b"
    return start_server(folder, str(bundle), "--profile", str(profile), *more, token=token)


@pytest.mark.scenario("SIGTERM under load; what is inside is finished")
@pytest.mark.slow
def test_sigterm_finishes_what_is_inside(tmp_path: Path) -> None:
    server = own_server(tmp_path)
    with load(server, 8) as under:
        under.wait_for(50)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("requests inside are finished")
        assert server.process.wait(120) == 0
    # Until the port closes: answered, or turned away in words; the end is a refused connection.
    # Never 404: whoever sends a request again elsewhere on 503 takes that for the last word.
    assert set(under.statuses) <= {200, 503, "ConnectionError"}, under.statuses
    assert under.statuses["ConnectionError"] <= 8
    assert "cut off" not in server.log()


@pytest.mark.scenario("replicas are added under load and taken away after it; no request fails")
@pytest.mark.slow
def test_replicas_follow_the_load(tmp_path: Path) -> None:
    server = own_server(tmp_path, "--autoscale", "1:2")
    server.post("/enroll", voice(150), speaker="heavy")
    assert len(server.replicas("SpeakerModels")) == 1
    with load(server, 16, heavy=True) as busy:
        wait_until(lambda: len(server.replicas("SpeakerModels")) == 2)
        busy.wait_for(50)
    with load(server, 1) as idle:
        wait_until(lambda: len(server.replicas("SpeakerModels")) == 1)
        idle.wait_for(20)
    assert set(busy.statuses) == set(idle.statuses) == {200}
    assert server.stop() == 0


@pytest.mark.scenario("ten minutes of load; memory does not grow")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_load_do_not_grow(tmp_path: Path) -> None:
    server = own_server(tmp_path)
    check_memory_holds(server, 600)
    assert server.stop() == 0

"""The base of endpoints: gate, limits, errors, health; a toy endpoint over real HTTP (uvicorn).

The same application runs inside Serve's replicas; tests/pipelines/endpoints and tests/security call
it there.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import APIRouter, Request, WebSocket
from pydantic import BaseModel

from goldcrest.cluster import serving
from goldcrest.cluster.errors import InputError
from goldcrest.cluster.serving import (
    Endpoint,
    ServingSettings,
    ingress,
    model_options,
    read_token,
)
from goldcrest.cluster.serving_events import DONE, EventStream, event
from goldcrest.cluster.serving_gate import is_loopback, token_digest
from goldcrest.cluster.serving_metrics import FOLDER_VARIABLE
from goldcrest.cluster.serving_process import free_port, reason_of, require_token

TOKEN = "a-token-of-the-tests-3f9c1b"


class Word(BaseModel):
    """A body for `/json`."""

    word: str
    times: int


class Toy(Endpoint):
    """Operations that show one property each."""

    title = "Toy"
    sick = False
    counted = -1
    asked = 0  # how often whether it is ready

    def __init__(self, settings: ServingSettings) -> None:
        super().__init__(settings)
        self.ended = threading.Event()

    def routes(self) -> APIRouter:
        """Echoes, sleeps and faults."""
        router = APIRouter()

        @router.post("/count")
        async def count(request: Request) -> dict[str, int]:
            return {"bytes": len(await request.body())}

        @router.post("/json")
        async def repeat(body: Word) -> dict[str, str]:
            return {"said": body.word * body.times}

        @router.get("/sleep/{seconds}")
        async def sleep(seconds: float) -> dict[str, float]:
            await asyncio.sleep(seconds)
            return {"slept": seconds}

        @router.get("/count/{number}")
        async def count_up(number: int, pause: float = 0.05, fault: bool = False) -> EventStream:
            async def events() -> AsyncIterator[bytes]:
                try:
                    for each in range(number):
                        await asyncio.sleep(pause)
                        self.counted = each
                        yield event(each)
                    if fault:
                        raise RuntimeError("secret: hunter2")
                    yield DONE
                finally:
                    self.ended.set()

            return EventStream(events())

        @router.get("/fault")
        async def fault() -> None:
            raise RuntimeError("secret: hunter2")

        @router.websocket("/ws")
        async def echo(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text(await socket.receive_text())
            await socket.close()

        return router

    async def ready(self) -> None:
        """Ready unless sick."""
        self.asked += 1
        if self.sick:
            raise RuntimeError("hunter2")


class Running:
    """A toy endpoint that answers at `url`."""

    def __init__(self, **settings: Any) -> None:
        self.endpoint = Toy(ServingSettings(**settings))
        self.port = free_port("127.0.0.1", 0)
        config = uvicorn.Config(
            self.endpoint.__serve_build_asgi_app__(), port=self.port, log_level="critical"
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End the server's thread."""
        self.server.should_exit = True
        self._thread.join(10)

    def raw(self, data: bytes, seconds: float = 20.0) -> bytes:
        """Send bytes as they are; all that comes back until the server closes or is done."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as line:
            line.sendall(data)
            return line.recv(65536)


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(**settings)` -> a running toy endpoint."""
    running: list[Running] = []

    def started(**settings: Any) -> Running:
        running.append(Running(**settings))
        return running[-1]

    yield started
    for each in running:
        each.stop()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with `TOKEN`."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


# -------------------------------------------------------------------------------------- token


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer " + "x" * 10_000,
        "Bearer caf\xe9",
    ],
)
def test_without_the_token_nothing_is_answered(
    start: Start, token_file: Path, header: str | None
) -> None:
    toy = start(token_file=token_file)
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/sleep/0", "/metrics", "/docs", "/openapi.json", "/nowhere"):
        answer = requests.get(toy.url + path, headers=headers, timeout=10)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in answer.text


def test_with_the_token_everything_is(start: Start, token_file: Path) -> None:
    toy = start(token_file=token_file)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for path in ("/sleep/0", "/metrics", "/docs", "/openapi.json"):
        assert requests.get(toy.url + path, headers=headers, timeout=10).status_code == 200, path
    assert requests.get(toy.url + "/healthz", timeout=10).status_code == 200
    assert requests.get(toy.url + "/readyz", timeout=10).status_code == 200


def test_a_websocket_wants_the_token_too(start: Start, token_file: Path) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    toy = start(token_file=token_file)
    url = toy.url.replace("http", "ws") + "/ws"
    with pytest.raises(InvalidStatus, match="403"), connect(url):
        pass
    with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as line:
        line.send("hello")
        assert line.recv() == "hello"


def test_the_gate_keeps_no_token(token_file: Path) -> None:
    endpoint = Toy(ServingSettings(token_file=token_file))
    assert endpoint.gate.token_digest == token_digest(TOKEN)
    assert TOKEN not in repr(vars(endpoint.gate))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"short", "20 characters"),
        (b"", "20 characters"),
        (b"with some spaces in the middle", "no spaces"),
        ("ein-sehr-langes-Paßwort-hier".encode(), "ASCII"),
    ],
)
def test_weak_tokens_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_token(tmp_path / "token")


def test_a_token_file_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_beyond_loopback_a_token_is_required(host: str, token_file: Path) -> None:
    with pytest.raises(InputError, match="token is required"):
        require_token(host, None)
    require_token(host, token_file)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    require_token(host, None)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::ffff"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example:80"},
    ],
)
def test_other_sites_cannot_call_through_the_users_browser(
    start: Start, headers: dict[str, str]
) -> None:
    """Without a token: neither a rebound DNS name nor a form of another page gets through."""
    toy = start()
    answer = requests.get(toy.url + "/sleep/0", headers=headers, timeout=10)
    assert answer.status_code == 403
    own = {"Origin": toy.url, "Host": f"localhost:{toy.port}"}
    assert requests.get(toy.url + "/sleep/0", headers=own, timeout=10).status_code == 200


# ------------------------------------------------------------------------------------- limits


def test_a_body_is_counted_however_it_comes(start: Start) -> None:
    toy = start(max_body_bytes=100_000)
    url = toy.url + "/count"

    def pieces(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 10_000

    assert requests.post(url, data=b"x" * 100_000, timeout=10).json() == {"bytes": 100_000}
    assert requests.post(url, data=pieces(10), timeout=10).json() == {"bytes": 100_000}
    for data in (b"x" * 100_001, pieces(11)):
        answer = requests.post(url, data=data, timeout=10)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"


def test_a_path_may_have_a_limit_of_its_own(start: Start) -> None:
    toy = start(max_body_bytes=100_000)
    toy.endpoint.gate.path_bytes = {"/count": 200_000}
    for size, status in ((200_000, 200), (200_001, 413)):
        for data in (b"x" * size, iter([b"x" * size])):  # declared, and in pieces
            assert requests.post(f"{toy.url}/count", data=data, timeout=10).status_code == status
    assert requests.post(f"{toy.url}/json", data=b"x" * 100_001, timeout=10).status_code == 413


def test_a_lie_about_the_length_gains_nothing(start: Start) -> None:
    toy = start(max_body_bytes=2000)
    huge = b"9" * 300
    for length in (b"5000", huge, b"1000000000000"):
        answer = toy.raw(
            b"POST /count HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\n\r\n" % length
        )
        assert answer.split()[1] in (b"413", b"400")


def test_a_body_that_dribbles_is_cut_off(start: Start) -> None:
    toy = start(body_seconds=0.5)
    head = b"POST /count HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx"
    assert toy.raw(head).split()[1] == b"408"


def test_an_answer_that_takes_too_long_is_504(start: Start) -> None:
    toy = start(request_seconds=0.3)
    answer = requests.get(toy.url + "/sleep/5", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_compressed_bodies_are_refused(start: Start) -> None:
    import gzip

    toy = start()
    bomb = gzip.compress(bytes(10_000_000))
    answer = requests.post(
        toy.url + "/count", data=bomb, headers={"Content-Encoding": "gzip"}, timeout=10
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "encoded_body")


def test_the_surplus_is_turned_away_at_once(start: Start) -> None:
    toy = start(max_requests=4)

    def call(_: int) -> requests.Response:
        return requests.get(toy.url + "/sleep/1.5", timeout=20)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(call, range(40)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4
    turned_away = [answer for answer in answers if answer.status_code == 503]
    assert {answer.headers["Retry-After"] for answer in turned_away} == {"1"}
    assert {answer.json()["error"]["code"] for answer in turned_away} == {"busy"}
    assert requests.get(toy.url + "/sleep/0", timeout=10).status_code == 200  # and then open again


def test_a_full_house_still_tells_its_health(start: Start) -> None:
    toy = start(max_requests=1)
    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(requests.get, toy.url + "/sleep/1", timeout=10)
        while not toy.endpoint.gate.inside:
            time.sleep(0.01)
        assert requests.get(toy.url + "/healthz", timeout=10).status_code == 200
        assert requests.get(toy.url + "/sleep/0", timeout=10).status_code == 503
        assert inside.result().status_code == 200


def test_draining_lets_those_inside_finish(start: Start) -> None:
    toy = start()

    def drain(seconds: float) -> int:
        return asyncio.run(toy.endpoint.drain(seconds))

    with ThreadPoolExecutor(2) as pool:
        inside = pool.submit(requests.get, toy.url + "/sleep/1", timeout=10)
        while not toy.endpoint.gate.inside:
            time.sleep(0.01)
        assert drain(0.0) == 1
        refused = requests.get(toy.url + "/sleep/0", timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert requests.get(toy.url + "/readyz", timeout=10).status_code == 503
        assert requests.get(toy.url + "/healthz", timeout=10).status_code == 200
        assert inside.result().status_code == 200
    assert drain(5.0) == 0


# ------------------------------------------------------------------------------------ streams


def events(answer: requests.Response) -> list[Any]:
    """The content of every event, `[DONE]` as None."""
    lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith(b"data: ") for line in lines)
    return [None if line == b"data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_stream_may_take_longer_than_its_beginning(start: Start) -> None:
    toy = start(request_seconds=0.3)
    with requests.get(toy.url + "/count/12", stream=True, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events(answer) == [*range(12), None]


def test_an_event_is_one_line_for_every_reader() -> None:
    said = {"text": "a\u2028b\u2029c\x85d\x0be\x1cf\rg\nh 🙂"}
    body = event(said)
    (line,) = filter(None, body.decode().splitlines())
    assert json.loads(line.removeprefix("data: ")) == said
    assert "🙂".encode() in body  # other text stays as short as it is


def test_events_are_not_kept_back(start: Start) -> None:
    toy = start()
    with requests.get(toy.url + "/count/2?pause=0.5", stream=True, timeout=10) as answer:
        lines = answer.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 0"
        assert not toy.endpoint.ended.is_set()


def test_a_stream_that_takes_too_long_is_told_why_it_ends(start: Start) -> None:
    toy = start(answer_seconds=0.5)
    with requests.get(toy.url + "/count/1000", stream=True, timeout=10) as answer:
        *before, last = events(answer)
    assert before == list(range(len(before)))
    assert last["error"]["code"] == "timeout"
    assert "0.5 s" in last["error"]["message"]
    assert toy.endpoint.ended.wait(5)
    assert toy.endpoint.gate.inside == 0


def test_a_reader_who_leaves_ends_the_stream(start: Start) -> None:
    toy = start(max_requests=1)
    with requests.get(toy.url + "/count/10000", stream=True, timeout=10) as answer:
        lines = answer.iter_lines(chunk_size=1)
        next(lines)
        busy = requests.get(toy.url + "/sleep/0", timeout=10)
        assert busy.status_code == 503  # a stream is a request inside until it ends
    assert toy.endpoint.ended.wait(5)
    assert toy.endpoint.counted < 100
    for _ in range(100):
        if not toy.endpoint.gate.inside:
            break
        time.sleep(0.05)
    assert requests.get(toy.url + "/sleep/0", timeout=10).status_code == 200


def test_a_stream_that_breaks_is_not_a_whole_one(start: Start) -> None:
    toy = start()
    with (
        requests.get(toy.url + "/count/3?fault=true", stream=True, timeout=10) as answer,
        pytest.raises(requests.exceptions.ChunkedEncodingError),
    ):
        events(answer)


def test_draining_waits_for_a_stream(start: Start) -> None:
    toy = start()
    with requests.get(toy.url + "/count/10", stream=True, timeout=10) as answer:
        lines = answer.iter_lines(chunk_size=1)
        next(lines)
        assert asyncio.run(toy.endpoint.drain(0.0)) == 1
        assert b"data: [DONE]" in list(lines)
    assert asyncio.run(toy.endpoint.drain(5.0)) == 0


# ------------------------------------------------------------------------------------- errors


def test_errors_have_the_fields_that_clients_of_openai_read(start: Start) -> None:
    toy = start()
    wrong = requests.post(toy.url + "/json", json={"word": "a", "times": "x"}, timeout=10).json()
    assert wrong["error"]["type"] == "invalid_request_error"
    assert wrong["error"]["param"] == "times"
    fault = requests.get(toy.url + "/fault", timeout=10).json()
    assert (fault["error"]["type"], fault["error"]["param"]) == ("server_error", None)


def test_wrong_json_is_named_without_its_value(start: Start) -> None:
    toy = start()
    broken = requests.post(
        toy.url + "/json", data="{", headers={"content-type": "application/json"}, timeout=10
    ).json()["error"]
    assert broken["message"].startswith("the body is not JSON: Expecting property name")
    assert broken["message"].endswith("at byte 1")
    assert broken["param"] is None
    answer = requests.post(toy.url + "/json", json={"word": ["hunter2"]}, timeout=10)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert [each["field"] for each in error["fields"]] == ["word", "times"]
    assert "hunter2" not in answer.text
    good = requests.post(toy.url + "/json", json={"word": "a", "times": 3}, timeout=10)
    assert good.json() == {"said": "aaa"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"word": "a", "times": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe",
        b"NaN",
        b"{",
    ],
)
def test_hostile_json_is_a_client_error(start: Start, body: bytes) -> None:
    toy = start()
    headers = {"Content-Type": "application/json"}
    answer = requests.post(toy.url + "/json", data=body, headers=headers, timeout=20)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 2000
    assert requests.get(toy.url + "/healthz", timeout=10).status_code == 200


def test_a_fault_keeps_its_text_to_itself(start: Start) -> None:
    toy = start()
    answer = requests.get(toy.url + "/fault", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    toy.endpoint.sick = True
    ready = requests.get(toy.url + "/readyz", timeout=10)
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
    assert "hunter2" not in answer.text + ready.text


def test_whoever_asks_often_whether_it_is_ready_costs_one_call(
    start: Start, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/readyz` wants no token and is not counted, so it tells nothing and does next to nothing."""
    monkeypatch.setattr(serving, "_READY_SECONDS", 60.0)
    toy = start(token_file=token_file)

    def ask(_: int) -> Any:
        return requests.get(toy.url + "/readyz", timeout=10).json()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == [{"status": "ready"}] * 24
    assert toy.endpoint.asked == 1


def test_readiness_is_forgotten_after_a_moment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_READY_SECONDS", 0.0)
    toy = start()
    for sick, status in ((False, 200), (True, 503), (False, 200)):
        toy.endpoint.sick = sick
        assert requests.get(toy.url + "/readyz", timeout=10).status_code == status


def test_requests_are_counted_by_route_not_by_name(start: Start) -> None:
    toy = start()
    for path in ("/sleep/0", "/sleep/0.0", "/made/up", "/made/up/too", "/sleep/x"):
        requests.get(toy.url + path, timeout=10)
    lines = requests.get(toy.url + "/metrics", timeout=10).text.splitlines()
    counted = {line for line in lines if line.startswith("goldcrest_requests_total")}
    assert 'goldcrest_requests_total{route="/sleep/{seconds}",status="200"} 2.0' in counted
    assert 'goldcrest_requests_total{route="/sleep/{seconds}",status="422"} 1.0' in counted
    assert 'goldcrest_requests_total{route="other",status="404"} 2.0' in counted


def metrics_folder(settings: ServingSettings) -> Path:
    """Where the replicas of an application that is started now have their metrics."""
    options: Any = ingress(Toy, settings).ray_actor_options
    return Path(options["runtime_env"]["env_vars"][FOLDER_VARIABLE])


def test_metrics_are_of_one_start_and_not_in_the_state_folder(tmp_path: Path) -> None:
    settings = ServingSettings(state_folder=tmp_path / "state")
    first, second = metrics_folder(settings), metrics_folder(settings)
    assert first != second
    assert not first.is_relative_to(tmp_path) and not first.exists()
    given = settings.model_copy(update={"metrics_folder": tmp_path / "metrics"})
    assert metrics_folder(given) == tmp_path / "metrics"


COUNT = """
import os, sys
from pathlib import Path
from goldcrest.cluster.serving_metrics import FOLDER_VARIABLE, RequestMetrics
for old in Path(os.environ[FOLDER_VARIABLE]).glob("gauge_*.db"):
    old.rename(old.with_name(f"gauge_livesum_{os.getpid()}.db"))  # as though we had its id
metrics = RequestMetrics()
for _ in range(int(sys.argv[1])):
    metrics.began()
metrics.answered("/x", 200, 0.1)
print(metrics.exposition().decode(), flush=True)
os._exit(9)
"""


def counted(folder: Path, inside: int) -> set[str]:
    """The metrics of a replica that is killed with `inside` requests inside."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(inside)],
        env={**os.environ, FOLDER_VARIABLE: str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 9
    return set(done.stdout.splitlines())


def test_a_replica_with_the_id_of_a_dead_one_has_only_its_own_requests_inside(
    tmp_path: Path,
) -> None:
    for inside, answered in ((3, 1), (1, 2)):  # what was answered is counted for all of them
        lines = counted(tmp_path / "metrics", inside)
        assert f"goldcrest_requests_in_progress {inside}.0" in lines
        assert f'goldcrest_requests_total{{route="/x",status="200"}} {answered}.0' in lines


# ----------------------------------------------------------------------------------- settings


def test_replicas_and_scaling_become_options() -> None:
    plain = model_options(ServingSettings(replicas=3, gpus=0.5))
    assert plain["num_replicas"] == 3
    assert plain["max_queued_requests"] == ServingSettings().max_requests  # not without end
    assert plain["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}
    scaled = model_options(ServingSettings(replicas=2, max_replicas=5))["autoscaling_config"]
    assert (scaled["min_replicas"], scaled["max_replicas"]) == (2, 5)
    with pytest.raises(InputError, match="below replicas"):
        model_options(ServingSettings(replicas=2, max_replicas=1))


def test_a_port_in_use_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1"):
            free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen"):
        free_port("not a host", 8000)


def test_a_failed_start_is_told_by_its_reason() -> None:
    text = "Deploying application failed\nTraceback\n  File x\nValueError: no such thing\n\nhint"
    assert reason_of(RuntimeError(text)) == "ValueError: no such thing"

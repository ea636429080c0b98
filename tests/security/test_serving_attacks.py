"""Hostile requests to a real `goldcrest serve`: through Serve's proxy, to the gate, to the decoder.

After each of them the endpoint must still answer its next caller.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from goldcrest.cluster.errors import InputError
from goldcrest.pipelines.endpoints.bundles import served_kind
from goldcrest.pipelines.endpoints.speaker_calibration import read_calibration
from goldcrest.pipelines.endpoints.speaker_enrolments import Enrolments
from goldcrest.tasks.speaker.bundle import read_description
from tests.pipelines.speaker_server import Server, make_calibration, voice, wav

LIMIT = 2_000_000  # bytes of a body, as the session's server is set


@pytest.fixture
def server(speaker_server: Server) -> Iterator[Server]:
    """The session's server, which must be well afterwards, with the processes that it had."""
    before = speaker_server.replicas("SpeakerEndpoint"), speaker_server.replicas("SpeakerModels")
    yield speaker_server
    assert speaker_server.post("/embed", voice(100)).status_code == 200
    after = speaker_server.replicas("SpeakerEndpoint"), speaker_server.replicas("SpeakerModels")
    assert before == after, "a replica died"


def talk(server: Server, data: bytes, seconds: float = 20.0) -> bytes:
    """Send bytes as they are, and read the beginning of the answer."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as line:
        try:
            line.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return line.recv(65536)


def head(server: Server, path: str, *lines: str) -> bytes:
    """The header of a POST with the token."""
    first = (f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {server.token}")
    return "\r\n".join([*first, *lines, "", ""]).encode()


# -------------------------------------------------------------------------------------- token


@pytest.mark.parametrize(
    "path",
    ["/enroll", "/verify", "/identify", "/embed", "/speakers", "/models", "/metrics", "/docs",
     "/openapi.json", "/speakers/anna", "//speakers", "/healthz/../speakers", "/healthz%2f..%2fx",
     "/demo/../speakers", "/healthz/"],
)  # fmt: skip
def test_no_path_goes_round_the_token(server: Server, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
        raw = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        status = talk(server, raw.encode()).split()[1]
        assert status == b"401", (method, path, status)


def test_a_wrong_token_is_refused(server: Server) -> None:
    for token in ("", "x", server.token + "x", server.token[:-1], server.token.upper()):
        headers = {"Authorization": f"Bearer {token}"}
        answer = requests.get(server.url + "/speakers", headers=headers, timeout=30)
        assert answer.status_code == 401
        assert server.token not in answer.text


# --------------------------------------------------------------------------------------- size


def test_an_oversize_body_is_refused(server: Server) -> None:
    answer = server.post("/embed", bytes(LIMIT + 1))
    assert answer.status_code == 413
    declared = talk(server, head(server, "/embed", f"Content-Length: {10**12}"))
    assert declared.split()[1] == b"413"


def test_an_oversize_chunked_body_is_refused_before_it_ends(server: Server) -> None:
    """It would be 500 MB: the client must be cut off long before."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        while sent < 500_000_000:
            sent += 100_000
            yield bytes(100_000)

    headers = {
        "Authorization": f"Bearer {server.token}",
        "Content-Type": "multipart/form-data; boundary=b",
    }
    try:
        answer = requests.post(server.url + "/embed", data=endless(), headers=headers, timeout=60)
        assert answer.status_code == 413
    except requests.ConnectionError:
        pass  # closed while the client was still sending: as good
    assert sent < 200_000_000


def test_a_form_of_very_many_parts_is_refused(server: Server) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n1\r\n'
    body = b"".join(part % n for n in range(20_000)) + b"--b--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b"
    answer = talk(server, head(server, "/embed", kind, f"Content-Length: {len(body)}") + body)
    assert answer.split()[1] in (b"400", b"422")
    many = server.post("/embed", *[b"x"] * 11)
    assert many.status_code == 400
    assert "Too many files" in many.json()["error"]["message"]


def test_compressed_bodies_are_not_unpacked(server: Server) -> None:
    bomb = gzip.compress(bytes(100_000_000), 9)
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
        headers = {"Content-Encoding": encoding}
        answer = server.call("POST", "/embed", bomb, headers=headers)
        assert answer.status_code == 415, encoding


# --------------------------------------------------------------------------------------- time


def test_a_slow_body_is_cut_off_and_others_are_answered(server: Server) -> None:
    """Eight clients send a byte now and then; the server waits 3 s for a body."""
    address = urlsplit(server.url)
    begin = head(
        server, "/embed", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 1000"
    )
    begin += b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'

    def dribble(_: int) -> bytes:
        with socket.create_connection((address.hostname, address.port), timeout=30) as line:
            line.sendall(begin)
            line.settimeout(0.5)
            for _ in range(60):
                try:
                    line.sendall(b"-")
                    if answer := line.recv(65536):
                        return answer
                except TimeoutError:
                    continue
                except OSError:
                    break
        return b""

    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(dribble, n) for n in range(8)]
        time.sleep(1.0)
        assert server.post("/embed", voice(100)).status_code == 200
        answers = [each.result() for each in slow]
    assert {answer.split()[1] for answer in answers} == {b"408"}


def test_clients_that_hang_up_cost_nothing(server: Server) -> None:
    address = urlsplit(server.url)
    for cut in (0, 10, 80, 200):
        with socket.create_connection((address.hostname, address.port)) as line:
            line.sendall(head(server, "/embed", "Content-Length: 50000")[:cut])
    for _ in range(10):
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(
                server.url + "/embed",
                headers={"Authorization": f"Bearer {server.token}"},
                files={"audio": voice(100, seconds=9)},
                timeout=(5, 0.001),
            )


# ------------------------------------------------------------------------------------ content


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"audio":' * 100_000 + b"}" * 100_000])
def test_deep_json_is_not_even_parsed(server: Server, body: bytes) -> None:
    for path in ("/embed", "/verify", "/enroll"):
        answer = server.call("POST", path, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        answer = requests.post(
            server.url + path,
            data=body,
            headers={
                "Authorization": f"Bearer {server.token}",
                "Content-Type": "application/json",
            },
            timeout=30,
        )
        assert answer.status_code == 422
        assert len(answer.content) < 2000


def audio_lies() -> dict[str, bytes]:
    """Files whose header promises what is not there, or too much of it."""
    plain = bytearray(voice(100))
    long = bytearray(plain)
    long[40:44] = (0xFFFFFFF0).to_bytes(4, "little")  # data of 4 GB
    long[4:8] = (0xFFFFFFFF).to_bytes(4, "little")
    many = bytearray(plain)
    many[22:24] = (65535).to_bytes(2, "little")  # channels
    fast = bytearray(plain)
    fast[24:28] = (0xFFFFFFFF).to_bytes(4, "little")  # Hz
    none = bytearray(plain)
    none[24:28] = (0).to_bytes(4, "little")
    flac = bytearray(wav(0.1 * np.sin(np.arange(32_000)), container="FLAC"))
    flac[21:26] = bytes([flac[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])  # 2^36 samples
    quiet = wav(np.zeros(30 * 60 * 16_000), container="FLAC")  # half an hour in a few kB
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(50_000_000))
    return {
        "long": bytes(long),
        "many": bytes(many),
        "fast": bytes(fast),
        "none": bytes(none),
        "flac": bytes(flac),
        "quiet": quiet,
        "zip": packed.getvalue(),
        "nan": wav(np.full(16_000, np.nan), subtype="FLOAT"),
        "huge": wav(np.full(16_000, 1e25), subtype="FLOAT"),
        "random": b"RIFF" + os.urandom(4) + b"WAVEfmt " + os.urandom(5000),
    }


@pytest.mark.parametrize("name", sorted(audio_lies()))
def test_audio_that_lies_is_refused_or_harmless(server: Server, name: str) -> None:
    answer = server.post("/embed", audio_lies()[name])
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["error"]["code"] == "invalid_audio"


def test_damaged_files_of_every_kind_are_survived(server: Server) -> None:
    """Bytes flipped at random: an answer each time, and the same processes afterwards."""
    draw = np.random.default_rng(20261121)
    tone = 0.1 * np.sin(np.arange(16_000) / 9)
    for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"):
        whole = wav(tone, container=container)
        broken = []
        for _ in range(8):
            data = bytearray(whole)
            for place in draw.integers(0, len(data), 12):
                data[place] = draw.integers(256)
            broken.append(bytes(data))
        for content in broken:
            answer = server.post("/embed", content)
            assert answer.status_code in (200, 422), (container, answer.text)


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "..%2fx", "%2e%2e%2fetc%2fpasswd", "a/b", "a%00b", ".hidden", "a" * 65,
     "x;DROP TABLE enrolment", "x' OR '1'='1", "<script>", "a%0d%0aX-Evil: 1", "~root", "-rf"],
)  # fmt: skip
def test_names_that_are_more_than_names(server: Server, name: str) -> None:
    files = sorted(path for path in server.folder.rglob("*") if "metrics" not in str(path))
    from urllib.parse import unquote

    assert server.post("/enroll", voice(100), speaker=unquote(name)).status_code == 422
    path = name.replace(" ", "%20").replace("<", "%3c").replace("'", "%27")
    raw = f"DELETE /speakers/{path} HTTP/1.1\r\nHost: localhost\r\n"
    raw += f"Authorization: Bearer {server.token}\r\n\r\n"
    answer = talk(server, raw.encode())
    assert answer.split()[1] in (b"404", b"405", b"422", b"400")
    assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]
    assert server.call("GET", "/speakers").json()["speakers"] == []
    after = sorted(path for path in server.folder.rglob("*") if "metrics" not in str(path))
    assert files == after


def test_a_model_name_is_no_path(server: Server) -> None:
    for name in ("../one", str(server.folder / "one"), "one@/etc", "one\n"):
        answer = server.post("/embed", voice(100), model=name)
        assert answer.status_code in (404, 422)
        assert str(server.folder) not in answer.text


def test_clients_cannot_steer_serve_by_headers(server: Server) -> None:
    """Serve routes by these headers; the gate's own clock and models hold all the same."""
    headers = {
        "serve_multiplexed_model_id": "0@/etc",
        "x-request-timeout-seconds": "0",
        "x-request-disconnect-disabled": "?1",
    }
    answer = server.call("POST", "/embed", voice(100), headers=headers)
    assert answer.status_code == 200
    assert answer.json()["model"] == "one"


# -------------------------------------------------------------------------- files of a bundle


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "asnorm"}, "score"),
        ({"system": "int8"}, "measured on 'int8'"),
        ({"thresholds": {"eer": 7.0}}, "thresholds"),
        ({"thresholds": {"eer": "0.5; rm"}}, "thresholds"),
        ({"histogram": {"edges": [0, 1], "target": [1, 2], "nontarget": [1]}}, "counts"),
        ({"histogram": {"edges": [1, 0], "target": [1], "nontarget": [1]}}, "ascend"),
        ({"trials": -1}, "trials"),
        ({"more": 1}, "more"),
    ],
)
def test_a_crafted_calibration_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    content = {**make_calibration({"eer": 0.5}), **change}
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_calibration(tmp_path, system="dense")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 500_000, b"\xff", b'{"eer": NaN}', b"0" * 2**21]
)
def test_a_calibration_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(InputError, match=r"calibration\.json"):
        read_calibration(tmp_path, system="dense")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 500_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b" " * 2**20 + b"{}", "larger than 1 MiB"),
        (b"\xff", "can't be read"),
        (b"", "can't be read"),
    ],
)
def test_a_crafted_description_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bundle.json"
    path.write_bytes(content)
    for read in (read_description, served_kind):
        with pytest.raises(InputError, match=words) as refused:
            read(tmp_path)
        assert str(path) in str(refused.value)


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "speakers.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match="cannot be used"):
        Enrolments(path, max_speakers=1, max_recordings=1)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="schema 99"):
        Enrolments(path, max_speakers=1, max_recordings=1)

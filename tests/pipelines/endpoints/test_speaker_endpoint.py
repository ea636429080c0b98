"""The speaker endpoint over HTTP: a real `goldcrest serve`, two bundles, two HTTP replicas."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import soundfile

from goldcrest.cluster.serving import SCRATCH
from goldcrest.pipelines.endpoints.bundles import MODELS
from goldcrest.tasks.speaker.bundle import load_bundle
from tests.pipelines.speaker_server import Server, voice, wav


@pytest.fixture
def server(speaker_server: Server) -> Server:
    """The session's server with nobody enrolled."""
    for row in speaker_server.call("GET", "/speakers").json()["speakers"]:
        speaker_server.call("DELETE", f"/speakers/{row['speaker']}")
    return speaker_server


def direct(server: Server, *recordings: bytes, bundle: str = "one") -> np.ndarray:
    """(N, E) unit embeddings, computed here without any server."""
    model = load_bundle(server.folder / bundle)
    read = [soundfile.read(io.BytesIO(each), dtype="float32")[0] for each in recordings]
    vectors = np.stack([model.embed_waveform(samples) for samples in read])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_embeddings_are_those_of_the_bundle(server: Server) -> None:
    recordings = [voice(100), voice(180, seconds=2.2), voice(240, seconds=0.7)]
    answer = server.post("/embed", *recordings).json()
    expected = direct(server, *recordings)
    assert np.array(answer["embeddings"]) == pytest.approx(expected, abs=1e-5)
    together = expected.mean(0) / np.linalg.norm(expected.mean(0))
    assert answer["embedding"] == pytest.approx(together, abs=1e-5)
    assert answer["seconds"] == pytest.approx([1.5, 2.2, 0.7], abs=0.001)
    assert answer["model"] == "one"


def test_two_recordings_are_compared(server: Server) -> None:
    recordings = voice(100, seed=1), voice(240, seed=2)
    answer = server.post("/verify", *recordings).json()
    a, b = direct(server, *recordings)
    assert answer["score"] == pytest.approx(float(a @ b), abs=1e-5)
    assert answer["threshold"] == 0.5
    assert answer["accept"] == (answer["score"] >= 0.5)
    same = server.post("/verify", recordings[0], recordings[0]).json()
    assert same["score"] == pytest.approx(1.0, abs=1e-5)
    assert same["accept"] is True


def test_a_speaker_is_the_mean_of_the_recordings(server: Server) -> None:
    """As in the evaluation: unit vectors are averaged, then the cosine is taken."""
    first, second, probe = voice(100, seed=1), voice(120, seed=2), voice(240, seed=3)
    assert server.post("/enroll", first, speaker="anna").json()["recordings"] == 1
    answer = server.post("/enroll", second, speaker="anna").json()
    assert (answer["speaker"], answer["recordings"]) == ("anna", 2)
    vectors = direct(server, first, second, probe)
    reference = vectors[:2].mean(0) / np.linalg.norm(vectors[:2].mean(0))
    verified = server.post("/verify", probe, speaker="anna").json()
    assert verified["score"] == pytest.approx(float(reference @ vectors[2]), abs=1e-5)


def test_enrolling_again_changes_nothing(server: Server) -> None:
    """A client that repeats a request whose answer it missed does not weigh a recording twice."""
    for _ in range(3):
        answer = server.post("/enroll", voice(100), speaker="anna")
    assert answer.json()["recordings"] == 1


def test_identify_ranks_the_enrolled(server: Server) -> None:
    pitches = {"anna": 90, "bert": 140, "cleo": 200, "dora": 260}
    for name, pitch in pitches.items():
        server.post("/enroll", voice(pitch, seed=pitch), speaker=name)
    probe = voice(200, seed=200)
    answer = server.post("/identify", probe, top=3).json()
    assert answer["candidates"][0]["speaker"] == "cleo"
    scores = [each["score"] for each in answer["candidates"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    enrolled = direct(server, *(voice(pitch, seed=pitch) for pitch in pitches.values()))
    best = sorted((enrolled @ direct(server, probe)[0]).tolist(), reverse=True)[:3]
    assert scores == pytest.approx(best, abs=1e-5)


def test_nobody_enrolled_is_no_candidate(server: Server) -> None:
    assert server.post("/identify", voice(100)).json()["candidates"] == []


def test_speakers_come_and_go(server: Server) -> None:
    server.post("/enroll", voice(100), voice(110), speaker="anna")
    (row,) = server.call("GET", "/speakers").json()["speakers"]
    assert (row["speaker"], row["model"], row["recordings"]) == ("anna", "one", 2)
    assert row["seconds"] == pytest.approx(3.0, abs=0.01)
    assert server.call("DELETE", "/speakers/anna").json() == {"speaker": "anna", "recordings": 2}
    again = server.call("DELETE", "/speakers/anna")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_speaker")
    gone = server.post("/verify", voice(100), speaker="anna")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_speaker")


def test_both_http_replicas_know_of_an_enrolment_at_once(server: Server) -> None:
    """Each call opens a connection of its own, so calls spread over the replicas."""
    probe = voice(150)
    for number in range(6):
        server.post("/enroll", voice(150 + number), speaker=f"s{number}")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: server.post("/identify", probe, top=20), range(4)))
        assert {len(answer.json()["candidates"]) for answer in answers} == {number + 1}
    assert len(server.replicas("SpeakerEndpoint")) == 2


def test_a_bundle_is_chosen_by_name(server: Server) -> None:
    recording = voice(100)
    answer = server.post("/embed", recording, model="two").json()
    expected = direct(server, recording, bundle="two")[0]
    assert answer["embedding"] == pytest.approx(expected, abs=1e-5)
    assert server.post("/verify", recording, recording, model="two").json()["threshold"] == 0.99
    unknown = server.post("/embed", recording, model="three")
    assert unknown.status_code == 404
    assert "one, two" in unknown.json()["error"]["message"]


def test_bundles_do_not_mix_in_a_batch(server: Server) -> None:
    recording = voice(100)
    expected = {name: direct(server, recording, bundle=name)[0] for name in ("one", "two")}
    names = ["one", "two"] * 6
    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda name: server.post("/embed", recording, model=name), names))
    for name, answer in zip(names, made, strict=True):
        assert answer.json()["embedding"] == pytest.approx(expected[name], abs=1e-5)


def test_an_enrolment_belongs_to_its_model(server: Server) -> None:
    server.post("/enroll", voice(100), speaker="anna")
    answer = server.post("/verify", voice(100), speaker="anna", model="two")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "other_model")
    assert "enrol again" in error["message"]
    assert server.post("/identify", voice(100), model="two").json()["candidates"] == []


def test_many_at_once_are_as_one_alone(server: Server) -> None:
    """Requests that share a batch, with padding, get the embeddings that they get alone."""
    recordings = [voice(90 + 10 * n, seconds=0.6 + 0.13 * n, seed=n) for n in range(12)]
    expected = direct(server, *recordings)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: server.post("/embed", each), recordings))
    made = np.array([answer.json()["embedding"] for answer in answers])
    assert made == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("container", "rate", "channels"),
    [("FLAC", 16_000, 1), ("OGG", 44_100, 2), ("MP3", 22_050, 1), ("WAV", 8_000, 2)],
)
def test_other_containers_rates_and_channels(
    server: Server, container: str, rate: int, channels: int
) -> None:
    t = np.arange(rate) / rate
    tone = 0.1 * np.sin(2 * np.pi * 200 * t)[:, None].repeat(channels, axis=1)
    answer = server.post("/embed", wav(tone, rate, container))
    assert answer.status_code == 200, answer.text
    assert answer.json()["seconds"] == pytest.approx([1.0], abs=0.1)


def voice_in_flac() -> bytes:
    """A FLAC file, which says in its header how many samples it has."""
    samples, rate = soundfile.read(io.BytesIO(voice(100, seconds=4)))
    return wav(samples, rate, "FLAC")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not audio at all", "not a readable audio file"),
        (b"", "empty"),
        (voice(100, seconds=0.1), "shorter than"),
        (voice(100, seconds=10.5), "longer than"),
        (voice_in_flac()[: len(voice_in_flac()) // 2], "damaged|truncated"),
        (wav(np.zeros(16_000)), "silent"),
        (wav(np.full(16_000, 1e25), subtype="FLOAT"), "as large as"),
        (wav(np.full((16_000, 9), 0.1)), "channels"),
        (wav(np.full(16_000, 0.1), rate=200_000), "sample rate"),
    ],
)
def test_unusable_audio_is_named(server: Server, content: bytes, words: str) -> None:
    answer = server.post("/verify", voice(100), content)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_audio"
    assert error["message"].startswith("audio[1]: ")
    assert any(word in error["message"] for word in words.split("|")), error


@pytest.mark.parametrize(
    ("path", "count", "form", "words"),
    [
        ("/enroll", 1, {}, "speaker"),
        ("/enroll", 0, {"speaker": "anna"}, "audio"),
        ("/enroll", 1, {"speaker": "../../etc/passwd"}, "speaker"),
        ("/enroll", 1, {"speaker": "a" * 65}, "speaker"),
        ("/enroll", 1, {"speaker": "a\x00b"}, "speaker"),
        ("/verify", 1, {}, "two recordings"),
        ("/verify", 3, {}, "two recordings"),
        ("/identify", 1, {"top": "0"}, "top"),
        ("/identify", 1, {"top": "many"}, "top"),
        # What is ignored would be no claim: two recordings of an impostor are alike.
        ("/verify", 2, {"speaker": ""}, "'speaker' is empty"),
        ("/verify", 2, {"name": "anna"}, "no field 'name'; its fields are: audio, speaker, model"),
        ("/verify", 2, {"speaker": ["anna", "bert"]}, "'speaker' more than once"),
        ("/verify?speaker=anna", 2, {}, "the query of this route has no field 'speaker'"),
        ("/enroll?speaker=anna", 1, {"speaker": "anna"}, "the query of this route"),
        ("/enroll", 1, {"speaker": "anna", "modl": "two"}, "no field 'modl'"),
        ("/identify", 1, {"model": ""}, "'model' is empty"),
        ("/embed", 1, {"speaker": "anna"}, "no field 'speaker'"),
    ],
)
def test_wrong_forms_are_named(
    server: Server, path: str, count: int, form: dict[str, Any], words: str
) -> None:
    answer = server.post(path, *[voice(100)] * count, **form)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "invalid"
    assert words in answer.json()["error"]["message"]


def test_a_query_that_is_ignored_is_refused_everywhere(server: Server) -> None:
    for method, path in (("GET", "/speakers"), ("GET", "/models"), ("DELETE", "/speakers/anna")):
        answer = server.call(method, f"{path}?model=two")
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "model"), path


def test_what_is_served_is_told(server: Server) -> None:
    one, two = server.call("GET", "/models").json()["models"]
    assert (one["name"], one["threshold"], one["dimensions"]) == ("one", 0.5, 12)
    assert (two["name"], two["threshold"]) == ("two", 0.99)
    assert len(one["calibration"]["histogram"]["edges"]) == 51


def test_health_metrics_and_documentation(server: Server) -> None:
    server.post("/embed", b"nothing")
    assert requests.get(server.url + "/healthz", timeout=30).json() == {"status": "alive"}
    ready = requests.get(server.url + "/readyz", timeout=30).json()
    assert ready == {"status": "ready"}  # which models there are is for callers with the token
    lines = [server.call("GET", "/metrics").text for _ in range(4)][-1].splitlines()
    (count,) = [line for line in lines if 'route="/embed",status="422"' in line]
    assert count.startswith("goldcrest_requests_total{")
    assert any(line.startswith("goldcrest_request_seconds_bucket{") for line in lines)
    api = server.call("GET", "/openapi.json").json()
    assert {"/enroll", "/verify", "/identify", "/embed", "/speakers"} <= set(api["paths"])
    docs = server.call("GET", "/docs")
    assert "/verify" in docs.text
    assert "default-src 'none'" in docs.headers["Content-Security-Policy"]


def test_a_browser_at_the_documentation_is_told_what_to_do(server: Server) -> None:
    refused = requests.get(server.url + "/docs", timeout=30)
    assert refused.status_code == 401
    assert "/docs > docs.html" in refused.json()["error"]["message"]
    assert "docs.html" not in requests.get(server.url + "/models", timeout=30).text
    (told,) = re.findall(r"API: (curl .* > )docs\.html", " ".join(server.log().split()))
    done = subprocess.run(
        ["bash", "-c", told + "/dev/stdout"], capture_output=True, check=True, timeout=60
    )
    assert b"/verify" in done.stdout


def test_metrics_are_the_same_from_both_replicas(server: Server) -> None:
    def counted() -> set[str]:
        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda _: server.call("GET", "/metrics").text, range(6)))
        found = (line for text in texts for line in text.splitlines())
        return {line for line in found if 'route="/identify",status="200"' in line}

    server.post("/identify", voice(100))
    assert len({line.split()[1] for line in counted() if line.startswith("goldcrest_req")}) >= 1
    (total,) = {line for line in counted() if line.startswith("goldcrest_requests_total")}
    assert float(total.split()[1]) >= 1
    assert list(server.folder.rglob("serve-scratch/metrics/counter_*.db"))  # not left in /tmp


def test_every_answer_has_one_request_id(server: Server) -> None:
    answer = server.call("GET", "/nowhere", headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 404
    assert answer.headers["X-Request-ID"] == "mine-1"
    assert answer.json()["request_id"] == "mine-1"
    raw = answer.raw.headers.getlist("x-request-id")
    assert raw == ["mine-1"]
    odd = server.call("GET", "/nowhere", headers={"X-Request-ID": "<script>"})
    assert odd.json()["request_id"] is None


def test_enrolments_are_private_and_hold_no_audio(server: Server) -> None:
    recording = voice(100)
    server.post("/enroll", recording, speaker="anna")
    database = server.folder / ".goldcrest" / "serve" / "speakers.sqlite"
    assert database.stat().st_mode & 0o077 == 0
    with sqlite3.connect(database) as connection:
        ((speaker, vector),) = connection.execute("SELECT speaker, vector FROM enrolment")
    assert speaker == "anna"
    assert np.frombuffer(vector, "<f4") == pytest.approx(direct(server, recording)[0], abs=1e-5)


def test_the_token_stands_nowhere(server: Server) -> None:
    server.post("/verify", voice(100), speaker="nobody")
    assert server.token not in server.log()
    state: Path = server.folder / ".goldcrest"
    for path in state.rglob("*"):
        if path.is_file():
            assert server.token.encode() not in path.read_bytes()
    assert json.loads((state / "serve" / SCRATCH / MODELS).read_text())["bundles"]

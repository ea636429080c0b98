"""The generate endpoint over HTTP: a real `goldcrest serve` on two tiny bundles."""

from __future__ import annotations

import itertools
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from goldcrest.pipelines.endpoints.generate_prompts import play
from goldcrest.tasks.data.audio import decode
from goldcrest.tasks.language.bundle import load_bundle
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.transcription import Transcriber
from tests.pipelines.speaker_server import start_server, voice, wav
from tests.pipelines.text_server import TOKEN, TextClient, make_text_bundle

ENDLESS = {"prompt": "Hello", "max_tokens": 90_000}
TURNS = [{"role": "user", "content": "Who sings?"}]


@pytest.fixture(scope="module")
def direct(text_server: TextClient) -> dict[str, Generator]:
    """The same bundles, loaded here without any server."""
    folder = text_server.server.folder
    return {name: Generator(load_bundle(folder / name)) for name in ("one", "two")}


def greedy(generator: Generator, prompt: Any, tokens: int, *stop: str) -> str:
    """The greedy answer of a generator."""
    chosen = GenerationSettings(max_new_tokens=tokens, stop=stop)
    return generator.generate([prompt], chosen)[0].text


# ------------------------------------------------------------------------------ whole answers


def test_a_completion_is_that_of_the_bundle(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    for name, generator in direct.items():
        answer = text_server.complete("The bird", model=name, temperature=0, max_tokens=12)
        (choice,) = answer["choices"]
        assert choice["text"] == greedy(generator, "The bird", 12)
        assert (choice["index"], choice["finish_reason"]) == (0, "length")
        assert choice["logprobs"] is None
        assert answer["usage"] == {
            "prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21
        }  # fmt: skip
        assert (answer["object"], answer["model"]) == ("text_completion", name)
        assert answer["id"].startswith("cmpl-")
        assert abs(answer["created"] - time.time()) < 600


def test_the_first_bundle_and_sixteen_tokens_are_the_default(text_server: TextClient) -> None:
    answer = text_server.complete("The bird")
    assert answer["model"] == "one"
    assert answer["usage"]["completion_tokens"] == 16


def test_a_stop_text_ends_the_answer(text_server: TextClient, direct: dict[str, Generator]) -> None:
    whole = greedy(direct["one"], "The bird", 12)
    stop = whole[5:7]
    (choice,) = text_server.complete(
        "The bird", temperature=0, max_tokens=12, stop=["never said", stop]
    )["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_several_prompts_as_text_or_tokens(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    texts = ["The bird", "A", "sings and sings"]
    for prompt in (texts, [direct["one"].encode(each) for each in texts]):
        answer = text_server.complete(prompt, temperature=0, max_tokens=8)
        assert [each["index"] for each in answer["choices"]] == [0, 1, 2]
        found = [each["text"] for each in answer["choices"]]
        assert found == [greedy(direct["one"], each, 8) for each in texts]
        assert answer["usage"]["completion_tokens"] == 24


def test_a_seed_makes_sampling_repeatable(text_server: TextClient) -> None:
    def texts(**more: Any) -> list[str]:
        answer = text_server.complete("The bird", max_tokens=12, **more)
        return [each["text"] for each in answer["choices"]]

    assert texts(seed=7, n=3) == texts(seed=7, n=3)
    assert len(set(texts(seed=7, n=3))) == 3
    assert texts(seed=7) == texts(seed=7, n=3)[:1]
    assert texts(seed=-1) == texts(seed=-1) != texts(seed=1)
    assert texts() != texts()


def test_many_at_once_are_as_one_alone(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    asked = [("The bird sings"[: 3 + n], name) for n in range(6) for name in ("one", "two")]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda a: text_server.text(a[0], model=a[1], max_tokens=8), asked))
    assert found == [greedy(direct[name], prompt, 8) for prompt, name in asked]


# ------------------------------------------------------------------------------------- speech


def test_speech_is_written_down_as_by_the_bundle(text_server: TextClient) -> None:
    transcriber = Transcriber(load_bundle(text_server.server.folder / "ears"))
    texts = set()
    for number, seconds in enumerate((0.3, 0.9)):
        sound = voice(150.0 + 90 * number, seconds=seconds, seed=number)
        heard = transcriber.hear([decode(sound)])
        (expected,) = transcriber.transcribe(heard, GenerationSettings(max_new_tokens=90_000))
        answer = text_server.hear(sound, model="ears")
        assert answer.json() == {"text": expected.text, "model": "ears"}
        plain = text_server.hear(sound, model="ears", response_format="text")
        assert plain.text == f"{expected.text}\n"
        texts.add(expected.text)
    assert len(texts) == 2 and "" not in texts


def test_a_recording_may_be_larger_than_other_bodies(text_server: TextClient) -> None:
    """One that fits the model's window: a second at 96 kHz in stereo. Text has the limit of text,
    which the server of the tests sets below it."""
    tone = 0.1 * np.sin(np.arange(96_000) / 40)[:, None].repeat(2, axis=1)
    sound = wav(tone, rate=96_000)
    assert len(sound) > 300_000
    answer = text_server.hear(sound, model="ears")
    assert answer.status_code == 200, answer.text
    assert text_server.post("completions", prompt="a" * 300_001).status_code == 413


@pytest.mark.parametrize(
    ("audio", "form", "words"),
    [
        (voice(150.0, seconds=1.5), {"model": "ears"}, "1.50 s is longer than 1 s"),
        (b"no audio at all", {"model": "ears"}, "not a readable audio file"),
        (voice(150.0, seconds=0.5), {"model": "one"}, "this model reads text, not audio"),
        (voice(150.0, seconds=0.5), {"model": "ears", "temperature": "1"}, "temperature"),
        (voice(150.0, seconds=0.5), {"model": "ears", "language": "hi"}, "'language' is not built"),
        (
            voice(150.0, seconds=0.5),
            {"model": "ears", "response_format": "srt"},
            "'json' or 'text'",
        ),
    ],
)
def test_what_is_not_heard_is_told(
    text_server: TextClient, audio: bytes, form: dict[str, str], words: str
) -> None:
    answer = text_server.hear(audio, **form)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_model_that_hears_takes_no_prompts(text_server: TextClient) -> None:
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": TURNS})):
        answer = text_server.post(path, model="ears", **body)
        assert answer.status_code == 400
        assert "send it to /v1/audio/transcriptions" in answer.json()["error"]["message"]


# --------------------------------------------------------------------------------------- chat


def test_a_chat_without_a_template_is_a_play(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    answer = text_server.post(
        "chat/completions", messages=TURNS, temperature=0, max_completion_tokens=9
    ).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": greedy(direct["one"], play(TURNS), 9, "\nUser:"),
        "refusal": None,
    }
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")


def test_an_answer_goes_back_as_the_next_requests_turn(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    body: Any = {"temperature": 0, "max_tokens": 9}
    first = text_server.post("chat/completions", messages=TURNS, **body).json()
    turns: Any = [*TURNS, first["choices"][0]["message"], {**TURNS[0], "name": "anna"}]
    answer = text_server.post("chat/completions", messages=turns, **body)
    assert answer.status_code == 200, answer.text
    expected = greedy(direct["one"], play(turns), 9, "\nUser:")
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_a_chat_with_a_template_is_written_by_it(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    answer = text_server.post(
        "chat/completions", model="two", messages=TURNS, temperature=0, max_tokens=9
    ).json()
    prompt = direct["two"].tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert answer["choices"][0]["message"]["content"] == greedy(direct["two"], prompt, 9)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_has_as_much_room_as_there_is(text_server: TextClient) -> None:
    used = text_server.post("chat/completions", model="two", messages=TURNS).json()["usage"]
    assert used["total_tokens"] == 200  # the model's context


def test_prompts_that_are_alike_are_sampled_apart(text_server: TextClient) -> None:
    body: Any = {"max_tokens": 20, "temperature": 1.0, "n": 2}
    choices = text_server.complete(prompt=["Once"] * 2, seed=5, **body)["choices"]
    texts = [each["text"] for each in sorted(choices, key=lambda each: each["index"])]
    assert len(set(texts)) == 4
    later = text_server.complete(prompt="Once", seed=7, **body)["choices"]
    assert [each["text"] for each in later] == texts[2:]  # the place is added to the seed


# ------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0.8, "seed": 3}])
def test_a_stream_is_the_answer_in_pieces(text_server: TextClient, more: Any) -> None:
    body = {"prompt": "The bird", "max_tokens": 20, "temperature": 0, **more}
    whole = text_server.complete(**body)
    events = text_server.events("completions", **body, stream_options={"include_usage": True})
    last = events.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {each["id"] for each in events} == {last["id"]}
    assert all(each["usage"] is None for each in events)
    for choice in whole["choices"]:
        parts = [each["choices"][0] for each in events]
        parts = [each for each in parts if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in parts) == choice["text"]
        reasons = [each["finish_reason"] for each in parts]
        assert reasons == [None] * (len(parts) - 1) + ["length"]


def test_a_chat_stream_begins_with_the_role(text_server: TextClient) -> None:
    body: Any = {"messages": TURNS, "temperature": 0, "max_tokens": 9}
    whole = text_server.post("chat/completions", **body).json()["choices"][0]["message"]
    events = text_server.events("chat/completions", **body)
    assert all(each["object"] == "chat.completion.chunk" for each in events)
    assert all("usage" not in each for each in events)
    deltas = [each["choices"][0]["delta"] for each in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(each.get("content", "") for each in deltas) == whole["content"]


def test_a_stop_text_never_shows_in_a_stream(
    text_server: TextClient, direct: dict[str, Generator]
) -> None:
    whole = greedy(direct["one"], "The bird", 20)
    stop = whole[9:12]
    events = text_server.events(
        "completions", prompt="The bird", temperature=0, max_tokens=20, stop=stop
    )
    parts = [each["choices"][0] for each in events]
    assert "".join(each["text"] for each in parts) == whole[: whole.index(stop)]
    assert parts[-1]["finish_reason"] == "stop"


def test_text_comes_while_it_is_made(text_server: TextClient) -> None:
    """Ninety thousand tokens would take minutes; the first are there at once."""
    with text_server.opened(**ENDLESS) as lines:
        for line in itertools.islice(lines, 5):
            assert json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] is None


def test_the_model_stops_when_the_reader_goes_away(text_server: TextClient) -> None:
    """Two endless streams take both places: who comes next waits, until they are left."""
    with ExitStack() as streams:
        both = [streams.enter_context(text_server.opened(**ENDLESS)) for _ in range(2)]
        assert all(next(lines) for lines in both)
        with pytest.raises(requests.exceptions.ReadTimeout):
            text_server.post("completions", prompt="x", temperature=0, seconds=1.0)
    assert len(text_server.text("Hello", max_tokens=3)) == 3


def test_the_model_stops_when_nobody_waits_for_the_answer(text_server: TextClient) -> None:
    def leave(temperature: float) -> None:
        with pytest.raises(requests.exceptions.ReadTimeout):
            text_server.post("completions", temperature=temperature, seconds=1.0, **ENDLESS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, [0.0, 0.0, 0.7, 1.3]))
    assert len(text_server.text("Hello", max_tokens=3)) == 3


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("completions", {"prompt": "a", "model": "three"}, 404, "model_not_found", "model"),
        ("completions", {}, 400, "invalid", "prompt"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "invalid", "max_tokens"),
        ("completions", {"prompt": "a", "echo": True}, 400, "invalid", "echo"),
        ("completions", {"prompt": "a", "n": 17}, 400, "too_many_choices", "n"),
        ("completions", {"prompt": "a", "max_tokens": 10**6}, 400, "too_many_tokens", "max_tokens"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 10**6},
            400,
            "too_many_tokens",
            "max_completion_tokens",
        ),
        ("completions", {"prompt": [5, 101]}, 400, "invalid_prompt", "prompt"),
        ("chat/completions", {"messages": []}, 400, "invalid", "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "content": "I"}], "model": "two"},
            400,
            "invalid_prompt",
            "messages",
        ),
    ],
)  # fmt: skip
def test_errors_are_those_that_clients_of_openai_know(
    text_server: TextClient, path: str, body: Any, status: int, code: str, param: str
) -> None:
    for stream in (False, True):
        answer = text_server.post(path, stream=stream, **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
        assert error["type"] == "invalid_request_error"
        assert error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_the_context_is_refused(text_server: TextClient, stream: bool) -> None:
    for prompt, tokens in (("x" * 300, 1), ("x" * 190, 20)):
        answer = text_server.post(
            "completions", model="two", prompt=prompt, max_tokens=tokens, stream=stream
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "context is 200 tokens" in error["message"]
    assert len(text_server.text("x" * 179, model="two", max_tokens=20)) == 20  # it just fits


# --------------------------------------------------------------------------------- operations


def test_the_models_are_listed(text_server: TextClient) -> None:
    listed = text_server.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["one", "two", "ears"]
    assert all(each["object"] == "model" for each in listed["data"])
    assert text_server.get("/v1/models/two").json() == listed["data"][1]
    unknown = text_server.get("/v1/models/three")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert text_server.get("/readyz").json() == {"status": "ready"}


def test_tokens_are_counted(text_server: TextClient) -> None:
    def counted() -> dict[str, float]:
        lines = text_server.get("/metrics").text.splitlines()
        found = (line.rpartition(" ") for line in lines if 'model="two"' in line)
        return {name: float(value) for name, _, value in found}

    written = 'goldcrest_tokens_total{kind="completion",model="two"}'
    streamed = 'goldcrest_first_token_seconds_count{model="two"}'
    text_server.events("completions", prompt="a", model="two", max_tokens=5, temperature=0)
    before = counted()
    text_server.text("a", model="two", max_tokens=5)
    text_server.events("completions", prompt="a", model="two", max_tokens=5, temperature=0)
    after = counted()
    assert after[written] - before[written] == 10
    assert after[streamed] - before[streamed] == 1


def test_the_documentation_names_the_fields(text_server: TextClient) -> None:
    page = text_server.get("/docs").text
    for word in ("/v1/completions", "/v1/chat/completions", "max_tokens", "stream_options"):
        assert word in page


def test_a_bundle_that_was_replaced_is_taken_into_service(text_server: TextClient) -> None:
    server, folder = text_server.server, text_server.server.folder
    before = text_server.get("/v1/models/two").json()["fingerprint"]
    (folder / "two").rename(folder / "kept")
    make_text_bundle(folder / "new", seed=5, context=200).rename(folder / "two")
    try:
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("now serving")
        assert text_server.get("/v1/models/two").json()["fingerprint"] != before
        fresh = Generator(load_bundle(folder / "two"))
        assert text_server.text("The bird", model="two", max_tokens=9) == (
            greedy(fresh, "The bird", 9)
        )
    finally:
        (folder / "two").rename(folder / "new-one")
        (folder / "kept").rename(folder / "two")
        server.process.send_signal(signal.SIGHUP)
        limit = time.monotonic() + 60
        while text_server.get("/v1/models/two").json()["fingerprint"] != before:
            assert time.monotonic() < limit
            time.sleep(0.2)


# ---------------------------------------------------------------------------------- long form


@pytest.mark.slow
def test_clocks_end_answers_and_the_model_with_them(tmp_path: Path) -> None:
    """One place, three seconds: an endless stream is told why it ends, an endless answer is 504."""
    bundle = make_text_bundle(tmp_path / "one")
    profile = tmp_path / "profile.yaml"
    profile.write_text("ray: {num_cpus: 2, object_store_memory: 100MB}")
    server = start_server(
        tmp_path, str(bundle), "--profile", str(profile), "-o", "parallel=1",
        "-o", "max_context=100000", "-o", "max_tokens=90000",
        "-o", "answer_seconds=3", "-o", "request_seconds=3", token=TOKEN,
    )  # fmt: skip
    client = TextClient(server)
    try:
        with client.opened(**ENDLESS) as lines:
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(client.text("Hello", max_tokens=3)) == 3
        answer = client.post("completions", **ENDLESS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert len(client.text("Hello", max_tokens=3)) == 3
    finally:
        assert server.stop() == 0

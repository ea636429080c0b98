"""The demo page in a real headless Chromium: token, upload, enrol, verify, record, forget."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.pipelines.speaker_server import Server, voice

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on this machine")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of two voices, and one that the browser takes for its microphone."""
    folder = tmp_path_factory.mktemp("recordings")
    made = {"anna": voice(100), "other": voice(240, seed=5), "microphone": voice(150, seconds=4)}
    for name, content in made.items():
        (folder / f"{name}.wav").write_bytes(content)
    return {name: folder / f"{name}.wav" for name in made}


@pytest.fixture
def page(speaker_server: Server, recordings: dict[str, Path]) -> Iterator[Any]:
    """The page, with everything that its console complains about."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium's own rule for root
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-audio-capture={recordings['microphone']}",
            ],
        )
        made = browser.new_page()
        made.set_default_timeout(30_000)
        complaints: list[str] = []
        made.on("pageerror", lambda error: complaints.append(str(error)))
        made.on("console", lambda line: complaints.append(line.text) if line.type == "error" else 0)
        made.goto(speaker_server.url + "/demo")
        yield made
        browser.close()
        # Refusals are part of the tests; anything else (a blocked script, an exception) is a fault.
        assert [each for each in complaints if "Failed to load resource" not in each] == []


def enter(page: Any, server: Server) -> None:
    """Give the token, as the page asks for it."""
    page.locator("#token").fill(server.token)
    page.locator("#enter").click()
    sync_api.expect(page.locator("#model option")).to_have_count(2)
    sync_api.expect(page.locator("#door")).to_be_hidden()


def said(page: Any, words: str) -> None:
    """The page says `words` (a pattern)."""
    sync_api.expect(page.locator("#say")).to_have_text(re.compile(words))


def test_enrol_and_verify_on_the_page(
    page: Any, speaker_server: Server, recordings: dict[str, Path]
) -> None:
    said(page, "wants the header")
    enter(page, speaker_server)
    page.locator("#file").set_input_files(recordings["anna"])
    said(page, "recording of 1.5 s")
    page.locator("#verify").click()
    said(page, "give a name")
    page.locator("#speaker").fill("anna")
    page.locator("#enroll").click()
    said(page, "anna is enrolled with 1")
    sync_api.expect(page.locator("#speakers li")).to_have_text(re.compile(r"anna \(one, 1 "))

    page.locator("#verify").click()
    sync_api.expect(page.locator("#verdict")).to_have_text("This is anna.")
    said(page, r"score (1\.000|0\.99\d), accepted from 0\.500")
    assert page.locator("#scores rect").count() == 100
    score = float(page.locator("#scores .score").get_attribute("x1"))
    threshold = float(page.locator("#scores .threshold").get_attribute("x1"))
    # The drawing is 600 wide and spans cosines from -1 to 1.
    assert threshold == pytest.approx(450, abs=0.5)
    assert score == pytest.approx(600, abs=5)

    page.locator("#model").select_option("two")
    page.locator("#file").set_input_files(recordings["other"])
    said(page, "recording of")
    page.locator("#verify").click()
    said(page, "enrolled with another model")

    page.locator("#speakers button").click()
    said(page, "anna is forgotten")
    assert speaker_server.call("GET", "/speakers").json()["speakers"] == []


def test_record_on_the_page(page: Any, speaker_server: Server) -> None:
    enter(page, speaker_server)
    page.locator("#record").click()
    sync_api.expect(page.locator("#record")).to_have_text("Stop")
    page.wait_for_timeout(1500)
    page.locator("#record").click()
    said(page, r"recording of \d\.\d s")
    page.locator("#speaker").fill("mike")
    page.locator("#enroll").click()
    said(page, "mike is enrolled")
    page.locator("#verify").click()
    sync_api.expect(page.locator("#verdict")).to_have_text("This is mike.")
    speaker_server.call("DELETE", "/speakers/mike")


def test_what_goes_wrong_is_said_on_the_page(
    page: Any, speaker_server: Server, tmp_path: Path
) -> None:
    enter(page, speaker_server)
    (tmp_path / "text.wav").write_text("<b>no audio</b>")
    page.locator("#file").set_input_files(tmp_path / "text.wav")
    said(page, "decode")
    page.locator("#enroll").click()
    said(page, "record something or choose a file")


def test_the_page_loads_nothing_from_elsewhere(speaker_server: Server) -> None:
    answer = requests.get(speaker_server.url + "/demo", timeout=30)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "http" not in answer.text.replace("http-equiv", "")
    script = requests.get(speaker_server.url + "/demo/page.js", timeout=30)
    assert script.headers["Content-Type"].startswith("text/javascript")
    for unsafe in ("innerHTML", "document.write", "eval(", "insertAdjacentHTML"):
        assert unsafe not in script.text

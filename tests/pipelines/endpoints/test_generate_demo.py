"""The page of language models in a real headless Chromium: token, an answer as it comes, Stop."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.pipelines.text_server import TextClient

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on this machine")


@pytest.fixture
def page(text_server: TextClient) -> Iterator[Any]:
    """The page behind its door, with everything that its console complains about."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],  # Chromium's own rule for root
        )
        made = browser.new_page()
        made.set_default_timeout(30_000)
        complaints: list[str] = []
        made.on("pageerror", lambda error: complaints.append(str(error)))
        made.on("console", lambda line: complaints.append(line.text) if line.type == "error" else 0)
        made.goto(text_server.server.url + "/demo")
        made.locator("#token").fill(text_server.server.token)
        made.locator("#enter").click()
        sync_api.expect(made.locator("#model option")).to_have_count(2)
        yield made
        browser.close()
        assert [each for each in complaints if "Failed to load resource" not in each] == []


def test_an_answer_comes_and_can_be_stopped(page: Any, text_server: TextClient) -> None:
    expect = sync_api.expect
    page.locator("#prompt").fill("The bird")
    page.locator("#temperature").fill("0")
    page.locator("#tokens").fill("12")
    page.locator("#go").click()
    expect(page.locator("#say")).to_have_text(re.compile("12 tokens in"))
    assert page.locator("#answer").text_content() == text_server.text("The bird", max_tokens=12)
    page.locator("#chat").check()
    page.locator("#go").click()
    expect(page.locator("#answer")).not_to_have_text(text_server.text("The bird", max_tokens=12))
    expect(page.locator("#say")).to_have_text(re.compile("tokens in"))
    page.locator("#tokens").fill("90000")
    page.locator("#go").click()
    page.locator("#stop").click()
    expect(page.locator("#say")).to_have_text("stopped")
    page.locator("#tokens").fill("0")
    page.locator("#go").click()
    expect(page.locator("#say")).to_have_text(re.compile("max_tokens"))


def test_the_page_is_fenced(text_server: TextClient) -> None:
    """It needs no token, for it asks for it itself; it loads nothing from elsewhere."""
    answer = requests.get(text_server.server.url + "/demo", timeout=30)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    script = requests.get(text_server.server.url + "/demo/page.js", timeout=30).text
    assert "innerHTML" not in answer.text + script

"""A new user who types `tunesmith ui` and nothing after it: from a CSV to a classifier that a program asks, by clock.

`TUNESMITH_ENCODER=FOLDER pytest tests/pages/test_new_user.py -m slow -s` prints the seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ENCODER = os.environ.get("TUNESMITH_ENCODER", "")
ROWS = Path(__file__).parents[2] / "examples" / "data" / "comments.csv"
PATIENCE_MS = 600_000
COMMENT = "it broke after two days and nobody answers"


class Clock:
    """Prints how long it has been since the command was typed."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {what}")


def tune(page: Any, clock: Clock) -> None:
    """From the empty list of runs to a result."""
    page.get_by_text("No runs yet").wait_for()
    clock.say("the pages are open")
    page.get_by_role("link", name="Look at your data").click()
    page.set_input_files("#file-to-send", ROWS)
    page.get_by_text("can be trained on").wait_for()
    clock.say("the file is there, and checked")
    page.get_by_role("link", name="Tune a model on it").click()
    page.fill("#model", ENCODER)
    page.get_by_role("button", name="Plan", exact=True).click()
    page.get_by_role("button", name="Start").wait_for()
    clock.say("the plan")
    page.get_by_role("button", name="Start").click()
    page.locator("#curve").wait_for()
    clock.say("the curve begins")
    page.locator("a", has_text="Result").wait_for()
    clock.say("the run is done")
    page.locator("a", has_text="Result").click()
    page.locator("#measures").wait_for()
    clock.say(f"the result: {page.locator('.lede').first.inner_text()[:150]}")


def chat(page: Any, clock: Clock) -> None:
    """From the result to a label."""
    page.get_by_role("link", name="Chat with both").click()
    page.get_by_role("button", name="Load it with its base").click()
    page.fill("#text", COMMENT)
    page.keyboard.press("Enter")
    page.locator(".probability").first.wait_for()
    clock.say(f"it says {page.locator('.side .text').first.inner_text()!r} in the chat")


def hand_on(page: Any, clock: Clock) -> None:
    """From the chat to a proven export, and to a program that asks."""
    page.get_by_role("link", name="Runs", exact=True).click()
    page.locator("td.main a").click()
    page.get_by_role("link", name="Curve and plan").click()
    page.get_by_role("button", name="Export").click()
    page.get_by_text("✓ agrees with the tuned model").wait_for()
    clock.say(f"exported: {page.locator('#export dl').inner_text().splitlines()[:4]}")
    page.get_by_role("button", name="Keep it loaded").click()
    page.get_by_text("until you unload it").wait_for()
    page.get_by_role("button", name="Make a key").click()
    page.wait_for_function("() => !document.getElementById('curl').textContent.includes('YOUR-KEY')")
    line = page.locator("#curl").inner_text().replace("Hello", COMMENT)
    answer = subprocess.run(["sh", "-c", line], capture_output=True, check=True, timeout=60).stdout
    label = json.loads(answer)["data"][0]
    clock.say(f"a program asks by the line of the page: {label['label']!r}")
    assert label["label"] == "negative"


@pytest.mark.pages
@pytest.mark.slow
@pytest.mark.skipif(not ENCODER, reason="TUNESMITH_ENCODER names no folder of a small encoder")
def test_from_a_csv_to_a_served_classifier(browser: Any, tmp_path: Path) -> None:
    folder, clock = tmp_path / "data", Clock()
    folder.mkdir()
    print()
    words = [sys.executable, "-m", "tunesmith", "ui", "--port", "0", "--json", "--no-browser", "--offline"]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        begun = json.loads(server.stdout.readline())
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(begun["link"])
        tune(page, clock)
        chat(page, clock)
        hand_on(page, clock)
    finally:
        server.terminate()
        server.wait(30)

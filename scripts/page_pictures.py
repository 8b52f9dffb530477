"""Draw the pages of `tunesmith ui` over folders that are there: by day and by night, for a phone and a desk.

python scripts/page_pictures.py RUNS DATA OUT [--model MODEL] [--browser PROGRAM] [--only run] [--chat "Where is it?"]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from playwright.sync_api import sync_playwright

WIDTHS = (390, 1200)
SCHEMES = ("light", "dark")
PATIENCE_MS = 120_000


def addresses(tab: Any, url: str, model: str) -> dict[str, str]:
    """The pages by the names of their pictures: of the newest run of each state, and of the first file."""
    runs = tab.request.get(f"{url}/v1/runs").json()
    files = tab.request.get(f"{url}/v1/local_files").json()["files"]
    pages = {"runs": "/ui/", "data": "/ui/data", "new": "/ui/new", "chat": "/ui/chat"}
    for row in reversed([*runs["runs"], *runs["working"]]):
        pages[f"run-{row['state'].replace(' ', '-')}"] = f"/ui/runs/{quote(row['name'])}"
        if row["state"] == "done":
            pages["result"] = f"/ui/runs/{quote(row['name'])}/result"
            pages["chat"] = f"/ui/chat?run={quote(row['name'])}"
    done = [row for row in runs["runs"] if row["state"] == "done"]
    alike = [[row["name"] for row in done if row["task"] == first["task"]][:3] for first in done]
    for names in [names for names in alike if len(names) > 1][:1]:
        pages["compare"] = f"/ui/compare?{urlencode({'run': names}, doseq=True)}"
        pages["compare-two"] = f"/ui/compare?{urlencode({'run': names[:2]}, doseq=True)}"
    if files:
        query = f"file={quote(files[0]['name'])}&model={quote(model)}"
        pages |= {"data-file": f"/ui/data?{query}"} | ({"plan": f"/ui/new?{query}"} if model else {})
    return pages


def chat(tab: Any, prompt: str) -> None:
    """Load the run that is chosen, unless it is there, and ask."""
    if not tab.locator("#text").count():
        tab.locator("#choose button").click()
    tab.locator("#text").wait_for(timeout=PATIENCE_MS)
    tab.fill("#text", prompt)
    tab.keyboard.press("Enter")
    tab.locator("#send:not([disabled])").wait_for(timeout=PATIENCE_MS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("runs", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--browser", help="where Playwright brought none: the program")
    parser.add_argument("--only", help="names of pictures that begin so")
    parser.add_argument("--chat", default="", help="a prompt to the newest run that is done, and to its base")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    words = [
        sys.executable,
        "-m",
        "tunesmith",
        "ui",
        "--runs",
        given.runs,
        "--data",
        given.data,
        "--port",
        "0",
        "--json",
    ]
    server = subprocess.Popen(list(map(str, [*words, "--offline"])), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        begun = json.loads(server.stdout.readline())
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=given.browser, args=["--no-sandbox"])
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            tab = context.new_page()
            tab.goto(begun["link"])
            tab.wait_for_url("**/ui/")
            for name, address in addresses(tab, begun["url"], given.model).items():
                if given.only and not name.startswith(given.only):
                    continue
                for width in WIDTHS:
                    for scheme in SCHEMES:
                        tab.emulate_media(color_scheme=scheme)
                        tab.set_viewport_size({"width": width, "height": 844 if width < 600 else 900})
                        tab.goto(begun["url"] + address)
                        tab.wait_for_function("() => !document.querySelector('.waiting')", timeout=PATIENCE_MS)
                        if name == "chat" and given.chat:
                            chat(tab, given.chat)
                        tab.wait_for_timeout(400)
                        tab.screenshot(path=given.out / f"{name}-{width}-{scheme}.png", full_page=True)
    finally:
        server.terminate()
        server.wait(20)
    return 0


if __name__ == "__main__":
    sys.exit(main())

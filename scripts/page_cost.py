"""What a live page costs a run on the same machine: tokens a second with and without it, in turns.

python scripts/page_cost.py MODEL DATA [--pairs 5] [--steps 30] [--browser PROGRAM]

Each pair is two runs with the same settings; every other pair begins with the page. With it: `tunesmith ui` serves,
and a browser has the run's page open from its beginning to its end. The first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import sync_playwright

FIRST = 3
"""Steps at the beginning that are not counted."""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *map(str, words)]


@contextmanager
def page_open(root: Path, browser: str | None) -> Iterator[Any]:
    """A tab on the list of runs of a server of its own."""
    words = command("ui", "--runs", root, "--data", root.parent, "--port", 0, "--json", "--offline")
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        begun = json.loads(server.stdout.readline())
        with sync_playwright() as play:
            started = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            tab = started.new_page()
            tab.goto(begun["link"])
            tab.wait_for_url("**/ui/")
            yield lambda name: tab.goto(f"{begun['url']}/ui/runs/{name}")
            started.close()
    finally:
        server.terminate()
        server.wait(20)


def speed(events: Path) -> float:
    """Tokens a second of the steps that count."""
    lines = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"][FIRST:]
    return float(sum(step["values"]["tokens"] for step in steps) / sum(step["timing"]["seconds"] for step in steps))


def trained(words: Sequence[object], run: Path, *, browser: str | None, has_page: bool) -> float:
    """The speed of one run."""
    process = subprocess.Popen(
        command("train", *words, "--out", run, "--json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if has_page:
        with page_open(run.parent, browser) as open_run:
            while not (run / "run.json").exists() and process.poll() is None:
                time.sleep(0.2)
            open_run(run.name)
            process.wait()
    if process.wait() != 0:
        raise SystemExit(f"{run}: the run failed; type the same command to see why: {' '.join(map(str, words))}")
    return speed(run / "events.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--browser", help="where Playwright brought none: the program")
    given = parser.parse_args()
    words = [given.model, given.data, "--fast", "--offline", "--set", "method.name=lora"]
    words += ["--set", f"train.max_steps={given.steps}", "--set", "data.held_out=0.02"]
    ratios = []
    with TemporaryDirectory() as folder:
        for pair in range(given.pairs):
            speeds = {}
            for has_page in ((True, False), (False, True))[pair % 2]:
                run = Path(folder) / "runs" / f"pair-{pair}-{'with' if has_page else 'without'}"
                speeds[has_page] = trained(words, run, browser=given.browser, has_page=has_page)
            ratios.append(speeds[True] / speeds[False])
            print(f"pair {pair + 1}: with {speeds[True]:.1f}, without {speeds[False]:.1f} tokens/s: {ratios[-1]:.4f}")
    print(f"median of {given.pairs} pairs: {statistics.median(ratios):.4f} (at least 0.99 is the budget)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

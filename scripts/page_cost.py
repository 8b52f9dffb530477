"""What a live page costs a run on the same machine: tokens a second with and without it, in turns of a few seconds.

python scripts/page_cost.py MODEL [--steps 700] [--turn 10] [--browser PROGRAM]

One run is trained while `tunesmith ui` serves and a browser has the run's page open. In every second turn the server
and the browser are stopped by a signal, so that both kinds of turn meet the same caches and neighbours: a machine's own
drift over minutes would hide one per cent. So would rows of different lengths: the rows here differ in digits alone.
The turns begin when the page is drawn as seldom as it ever is, since its first minutes are no measure of a run of
hours, and are as long as the page waits between two drawings. Steps that lie in two turns are not counted. The script
also prints the processor seconds that the server and the browser took, which is the most that they could take from a
run.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
from playwright.sync_api import sync_playwright

from tunesmith.pages.live import LIVE_S


class Turn(NamedTuple):
    """A few seconds in which the page was live, or was stopped."""

    begin: float
    end: float
    is_live: bool


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *map(str, words)]


@contextmanager
def page_open(root: Path, browser: str | None) -> Iterator[tuple[Any, str, psutil.Process]]:
    """A tab on the list of runs of a server of its own; the pages' address; the server's process."""
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
            yield tab, begun["url"], psutil.Process(server.pid)
            started.close()
    finally:
        server.terminate()
        server.wait(20)


def programs(server: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The processes of the server and of the browser."""
    browser = [child for child in psutil.Process().children(recursive=True) if "chrom" in child.name()]
    return {"server": [server, *server.children(recursive=True)], "browser": browser}


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def turns_of(run: subprocess.Popen[bytes], processes: Sequence[psutil.Process], seconds: float) -> list[Turn]:
    """Stop and continue the page in turns until the run ends."""
    turns = []
    while run.poll() is None:
        begin, is_live = time.time(), len(turns) % 2 == 0
        for process in processes:
            process.resume() if is_live else process.suspend()
        time.sleep(seconds)
        turns.append(Turn(begin, time.time(), is_live))
    for process in processes:
        process.resume()
    return turns


def equal_rows(folder: Path) -> Path:
    """A file of 500 chats that differ in their digits alone, so that each step takes equally long."""
    question = "How do I send back parcel {}? It came on Monday, the box was open, and one of two parts was broken."
    answer = "Print the label for parcel {} from your orders, put both into the box, and bring it to any post office."
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(100, 600):
            turns = [("user", question), ("assistant", answer)]
            row = {"messages": [{"role": role, "content": text.format(number)} for role, text in turns]}
            file.write(json.dumps(row) + "\n")
    return path


def speed(turn: Turn, steps: Sequence[dict[str, Any]]) -> float | None:
    """Tokens a second of the steps that lie within the turn; None where none does."""
    inside = [
        step for step in steps if turn.begin <= step["time"] - step["timing"]["seconds"] and step["time"] <= turn.end
    ]
    seconds = sum(step["timing"]["seconds"] for step in inside)
    return sum(step["values"]["tokens"] for step in inside) / seconds if inside else None


def ratios_of(turns: Sequence[Turn], events: Path) -> list[float]:
    """Live by stopped, for each two turns that follow each other."""
    lines = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    ratios = []
    for turn, following in pairwise(turns):
        speeds = {part.is_live: speed(part, steps) for part in (turn, following)}
        if speeds[True] and speeds[False]:
            ratios.append(speeds[True] / speeds[False])
    return ratios


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median by 2,000 bootstrap samples."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--turn", type=float, default=LIVE_S[1], help="seconds")
    parser.add_argument("--browser", help="where Playwright brought none: the program")
    options = parser.parse_args()
    words = ["--fast", "--offline", "--set", "method.name=lora", "--set", "train.rows_per_step=2"]
    words += ["--set", f"train.max_steps={options.steps}", "--set", "data.held_out=0.02"]
    with TemporaryDirectory() as folder:
        words[:0] = [options.model, str(equal_rows(Path(folder)))]
        run = Path(folder) / "runs" / "watched"
        with page_open(run.parent, options.browser) as (tab, url, server):
            line = command("train", *words, "--out", run, "--json")
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            events = run / "events.jsonl"
            while process.poll() is None and not (events.exists() and '"step"' in events.read_text("utf-8")):
                time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit(f"the run ended before its first step. Type it to see why: {shlex.join(line)}")
            answer = tab.goto(f"{url}/ui/runs/{run.name}")
            if answer.status != 200:
                raise SystemExit(f"{answer.url}: {answer.status}, where the page of the run was expected")
            while process.poll() is None and tab.evaluate("Number(document.body.dataset.live)") < LIVE_S[1]:
                time.sleep(1)
            watched = programs(server)
            before = {name: processor_seconds(parts) for name, parts in watched.items()}
            turns = turns_of(process, [part for parts in watched.values() for part in parts], options.turn)
            live = sum(turn.end - turn.begin for turn in turns if turn.is_live)
            for name, parts in watched.items():
                taken = processor_seconds(parts) - before[name]
                print(f"{name}: {60 * taken / live:.2f} processor seconds in a minute of a live page")
        if process.returncode != 0:
            raise SystemExit(f"the run failed. Type it to see why: {shlex.join(line)}")
        ratios = ratios_of(turns, events)
    low, high = interval(ratios)
    median = statistics.median(ratios)
    print(f"tokens/s with a live page by without: {median:.4f} ({low:.4f} to {high:.4f}, {len(ratios)} pairs of turns)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

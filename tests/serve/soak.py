"""Thousands of asks in a row: what each must be answered with, and whether the memory of a process stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tiny_run import WORDS
from tunesmith.generation import padded
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.inference import load as loading
from tunesmith.runs.folder import Run
from tunesmith.types import Part

CLIENTS = 16
LIMITS = (2, 7, 16)
"""Longest answers, in tokens."""
WARM_UP = 0.2
"""Share of the asks before memory is compared: allocators and caches fill until then."""
WINDOWS = 5
FLAT = 0.05


@dataclass(frozen=True)
class Case:
    """A chat of one message, and what the model alone answers to it, greedily."""

    model: str
    text: str
    max_tokens: int
    answer: GeneratedAnswer


def texts(num: int) -> list[str]:
    """Prompts of one to two hundred words: some fill several pools of the cache."""
    draw = random.Random(1)
    words = " ".join(WORDS).split()
    lengths = [draw.randint(1, 12) if i % 8 else draw.randint(80, 200) for i in range(num)]
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


def cases(root: Path, runs: Sequence[str], base: str, *, num_texts: int) -> list[Case]:
    """Every text to every model, answered by `transformers.generate` alone."""
    speakers = {name: loading.load_run(Run.open(name, root), offline=True) for name in runs}
    speakers[base] = loading.load_model(str(root.parent / base), offline=True)
    found = []
    for name, speaker in speakers.items():
        for number, text in enumerate(texts(num_texts)):
            prompt = speaker.renderer.prompt_ids([Part("user", text, trained=False)])
            limit = LIMITS[number % len(LIMITS)]
            [said] = padded.generate(speaker.model, speaker.renderer, [prompt], limit)
            found.append(Case(name, text, limit, said))
    return found


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * 4096


class Watch:
    """The memory of processes while work goes on: (share of it that is done, bytes) of each, at each `look`."""

    def __init__(self, pids: Mapping[str, int], done: Callable[[], float]) -> None:
        self.seen: dict[str, list[tuple[float, int]]] = {name: [] for name in pids}
        self._pids = pids
        self._done = done

    def look(self) -> None:
        """Called after each piece of work, so that every stretch is seen however busy the machine is."""
        for name, pid in self._pids.items():
            self.seen[name].append((self._done(), resident(pid)))

    def windows(self, name: str) -> list[float]:
        """The median of each stretch of the work after the warm-up, in MiB."""
        found: list[list[int]] = [[] for _ in range(WINDOWS)]
        for done, held in self.seen[name]:
            place = int((done - WARM_UP) / (1 - WARM_UP) * WINDOWS)
            if done >= WARM_UP:
                found[min(place, WINDOWS - 1)].append(held)
        return [median(some) / 2**20 for some in found]

    def assert_flat(self) -> None:
        """No stretch holds more than 5 % more than another."""
        for name in self.seen:
            held = self.windows(name)
            print(f"{name}: {', '.join(f'{one:.1f}' for one in held)} MiB")
            assert max(held) <= (1 + FLAT) * min(held), f"the memory of {name} grows: {held}"

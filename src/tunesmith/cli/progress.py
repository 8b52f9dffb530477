"""How far something is, on a terminal and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(screen: Console, words: str) -> Iterator[Callable[[int, int], None]]:
    """How much is done and how much there is, of one thing."""
    with phases(screen, {words: words}) as progress:
        yield lambda done, total: progress(words, done, total)


@contextmanager
def phases(screen: Console, words: Mapping[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """What is done, how much of it, and how much there is: one bar that moves on from each thing to the next."""
    if not screen.is_terminal:
        yield lambda what, done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as progress:
        bar = progress.add_task("")
        now = ""

        def tick(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:
                now = what
                progress.reset(bar, description=words.get(what, what))
            progress.update(bar, completed=done, total=total)

        yield tick

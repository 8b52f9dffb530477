"""Tiny runs on one base, and an engine over them, for tests that need the child process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

import fresh
from serve.batches import Heard, sharp
from tiny_run import tiny_recipe
from tunesmith.runs.folder import Run
from tunesmith.serve.engine import WorkerEngine
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, StreamEvent
from tunesmith.training import trainer as training

T = TypeVar("T")
UNMEASURED: dict[str, Any] = {"evaluation": {"samples": 0, "surprising": 0}}
"""Of a run that is only served."""
OPTIONS = EngineOptions(max_new_tokens=32, streams=4, queue=8, threads=1, offline=True)


def two_runs(folder: Path) -> list[Run]:
    """Runs called first and second, on one base whose answers differ from prompt to prompt, with different seeds."""
    runs = []
    for seed, name in enumerate(("first", "second")):
        how = {"method": {"name": "lora", "rank": 4, "alpha": 16}, "train": {"max_steps": 8}, **UNMEASURED}
        recipe = tiny_recipe(folder, seed=seed, optim={"lr": 1e-2}, **how)
        sharp("llama").save_pretrained(recipe.model)
        runs.append(training.train(recipe, root=folder / "runs", out=folder / "runs" / name, offline=True))
    return runs


class Asked:
    """An engine and the loop it lives on."""

    def __init__(self, names: Sequence[str], root: Path, options: EngineOptions = OPTIONS) -> None:
        self.loop = asyncio.new_event_loop()
        self.notes: list[str] = []
        try:
            made = WorkerEngine(names, root=root, options=options, on_note=self.notes.append)
            engine = self.loop.run_until_complete(made.start())
        except BaseException:
            self.loop.close()
            raise
        assert isinstance(engine, WorkerEngine)
        self.engine = engine

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def answer(self, ask: GenerationRequest) -> Heard:
        """What is told of one ask. Raises RequestError."""
        return self.run(heard(self.engine.generate(ask)))

    def close(self) -> None:
        self.run(self.engine.close(0.0))
        self.loop.close()


async def heard(told: AsyncIterator[StreamEvent]) -> Heard:
    found = Heard()
    async for one in told:
        found.hear(one)
    return found


@contextmanager
def engine_over(names: Sequence[str], root: Path, options: EngineOptions = OPTIONS) -> Iterator[Asked]:
    """Its process is forked, see `fresh.python`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.serve.engine.python_words", lambda module: [str(fresh.python()), "-m", module])
        asked = Asked(names, root, options)
        try:
            yield asked
        finally:
            asked.close()


async def until(holds: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Wait until something holds; AssertionError if it does not within the time."""
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to hold")


def says(model: str, text: str, **how: Any) -> GenerationRequest:
    """A chat of one message, answered greedily unless asked otherwise."""
    return GenerationRequest(
        model, messages=({"role": "user", "content": text},), **{"temperature": 0.0, "max_tokens": 12, **how}
    )

"""An engine that is killed at its writes, while the results of a job are put on it and asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.places import put_file
from jobs.test_kills import needs_strace, real_outcome, traced
from serve.engines import OPTIONS, heard, says, until
from tiny_run import chats
from tunesmith.jobs.bases import Bases, PublicBase
from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.routes import create_job
from tunesmith.jobs.server import JobServer
from tunesmith.jobs.states import ENDED
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events
from tunesmith.serve.engine import WorkerEngine
from tunesmith.serve.protocol import RequestError

STRIDE = int(os.environ.get("TUNESMITH_KILL_STRIDE", "3"))
BASES = Bases(bases={"tiny": PublicBase(model="tiny")})


@asynccontextmanager
async def working(folder: Path) -> AsyncIterator[tuple[JobServer, WorkerEngine]]:
    store = Store(folder / "store")
    server = await JobServer.start(store, BASES, OPTIONS, root=folder, on_note=lambda text: None)
    try:
        engine = server.engines._engines["tiny"]
        assert isinstance(engine, WorkerEngine)
        yield server, engine
    finally:
        await server.close()
        await server.engines.close(0)
        store.close()


async def answer(engine: WorkerEngine, model: str) -> str:
    """What it writes, asked again while it is being started again."""
    while True:
        try:
            return (await heard(engine.generate(says(model, "hello")))).texts[0]
        except RequestError as error:
            if error.status not in (500, 503):
                raise
            await asyncio.sleep(0.1)


async def from_run_to_answer(folder: Path, run: Path, num: int) -> tuple[bool, dict[str, Any]]:
    """A job whose run is done already; its engine is killed at a write. Whether it was, and what a client sees."""
    async with working(folder) as (server, engine):
        shutil.copytree(
            run, server.store.runs_path / run.name
        )  # its server sets aside what no job names when it starts
        assert engine._worker is not None
        first = engine._worker.process.pid
        tracer: subprocess.Popen[bytes] | None = traced(first, num) if num else None
        file = put_file(server.store, chats(folder / "rows.jsonl", 18).read_bytes())
        name = str(create_job(server.store, BASES, JobBody(model="tiny", training_file=file, seed=3))["id"])
        await until(lambda: (server.store.job(name) or {})["status"] in ENDED)
        job = server.store.job(name) or {}
        answers = {row["step"]: await answer(engine, row["name"]) for row in server.store.tuned(job=name)}
        said = server.store.page(events, events.c.job == name, limit=100)[0]
        found = {
            "status": job["status"],
            "error": job["error"],
            "answers": answers,
            "base": await answer(engine, next(card.name for card in engine.served if card.is_base)),
            "events": sorted((row["message"], str(row["data"])) for row in said),
            "served": sorted(card.name for card in engine.served if not card.is_base),
        }
        is_killed = engine._worker is None or engine._worker.process.pid != first
    if tracer is not None:
        tracer.wait()
    return is_killed, found


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_engine_killed_at_its_writes_serves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_outcome(tmp_path, 0, monkeypatch)
    (tmp_path / "store").rename(tmp_path / "done")
    run = tmp_path / "done" / "runs" / ("ftjob-" + "A" * 24)

    def made(num: int) -> tuple[bool, dict[str, Any]]:
        try:
            return asyncio.run(from_run_to_answer(tmp_path, run, num))
        finally:
            shutil.rmtree(tmp_path / "store")

    is_killed, whole = made(0)
    assert (is_killed, whole["error"], len(whole["answers"])) == (False, None, 2)
    num, kills = 1, 0
    while True:
        is_killed, found = made(num)
        assert found == whole, f"killed at write {num}"
        if not is_killed:
            break
        num, kills = num + STRIDE, kills + 1
    print(f"{kills} kills, the last at write {num - STRIDE}")
    assert kills > 2

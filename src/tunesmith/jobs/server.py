"""Everything behind `tunesmith serve --jobs`: store, engines, dispatcher and routes, from start to end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from tunesmith.errors import InputError
from tunesmith.jobs.bases import Bases
from tunesmith.jobs.dispatcher import Dispatcher
from tunesmith.jobs.engines import Engines, EnginesFromThread
from tunesmith.jobs.grader_routes import make_grader_router
from tunesmith.jobs.launcher import LocalLauncher, rest_of_card
from tunesmith.jobs.permissions import make_permission_router
from tunesmith.jobs.ray_launcher import RayLauncher
from tunesmith.jobs.routes import make_file_router, make_job_router, make_model_router, make_upload_router
from tunesmith.jobs.store import Store
from tunesmith.jobs.webhooks import WebhookSender
from tunesmith.serve.engine import WorkerEngine
from tunesmith.serve.protocol import EngineOptions


@dataclass
class JobServer:
    """A store that is being worked on. Made by `start`."""

    store: Store
    engines: Engines
    routers: tuple[APIRouter, ...]
    _stop: threading.Event
    _threads: tuple[threading.Thread, ...]

    @classmethod
    async def start(
        cls,
        store: Store,
        bases: Bases,
        options: EngineOptions,
        *,
        root: Path,
        on_note: Callable[[str], None],
        ray: Any = None,
    ) -> JobServer:
        """Load all bases with tuned models, and begin to work on jobs. Raises what starting an engine does."""
        store.rules = bases
        started: dict[str, WorkerEngine] = {}
        engines, loop = Engines(started, bases), asyncio.get_running_loop()
        if ray is None:
            rest_of_card()  # which is refused here, not at the first job
        launcher = LocalLauncher(offline=options.offline) if ray is None else RayLauncher(ray, offline=options.offline)
        slots = launcher.slots if isinstance(launcher, RayLauncher) else 1
        dispatcher = Dispatcher(store, bases, launcher, EnginesFromThread(engines, loop), on_note, slots)
        await asyncio.to_thread(dispatcher.recover)  # before an upload that it could take for a leftover
        try:
            options = replace(options, attaches=True, engines=len(bases.bases))
            for name, base in bases.bases.items():
                attached = {row["name"]: store.model_path(row) for row in store.tuned(base=name)}
                settings: Any = {"options": options, "attached": attached, "on_note": on_note}
                started[name] = await WorkerEngine([base.model], root=root, **settings).start()
                if not any(card.is_base and card.answers == "text" for card in started[name].served):
                    raise InputError(f"{base.model}: writes no text, and jobs tune models that do.")
        except BaseException:
            for engine in started.values():
                await engine.close(0)
            raise
        engines.readers = store.readers()
        stop = threading.Event()
        routers = make_routers(store, bases, engines)
        has_webhooks = any(rules.webhook for rules in (bases.every_project, *bases.projects.values()))
        works = [dispatcher.run, *([WebhookSender(store, on_note).run] if has_webhooks else [])]
        threads = tuple(threading.Thread(target=work, args=(stop,), daemon=True) for work in works)
        for thread in threads:
            thread.start()
        return cls(store, engines, routers, stop, threads)

    async def close(self) -> None:
        """End the work. A run under way stops after its step, and continues under the next server."""
        self._stop.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 10)


def make_routers(store: Store, bases: Bases, engines: Engines) -> tuple[APIRouter, ...]:
    """All routes of a server of jobs but the engine's."""
    return (
        make_file_router(store),
        make_upload_router(store),
        make_job_router(store, bases),
        make_grader_router(bases.graders),
        make_grader_router(bases.graders),
        make_model_router(store, bases, engines.detach),
        make_permission_router(store, engines),
    )

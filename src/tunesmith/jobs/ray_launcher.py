"""Runs of jobs as Ray tasks, on this machine or on a cluster whose machines see the folder of the store.

A task is only the place of a run: it starts the child that `LocalLauncher` starts, and waits for it. So a
killed server, task or machine leaves what a killed local run leaves: a folder, and a lock that is held or free.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith.environment.process import CARD_SHARE
from tunesmith.jobs.launcher import ChildProcess, LocalLauncher
from tunesmith.parallel.cluster import needs_of
from tunesmith.recipe import load
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject

POLL_S = 0.5


def hold_place(run: Path, recipe: Path, environment: Mapping[str, str], offline: bool, server: str) -> None:
    """The task: ends when the run does. A child that a lost task left at work continues, and is waited for. On
    another machine than the `server` it has its card for itself."""
    launcher = LocalLauncher(offline=offline)
    share = {} if socket.gethostname() == server else {CARD_SHARE: "1"}
    process = launcher.find(run) or launcher.start(run, recipe, {**share, **environment})
    while process.is_alive():
        time.sleep(POLL_S)


@dataclass(frozen=True)
class RayRun:
    """A run that waits for a place on the cluster, or has one. `task` is None for one of an earlier server."""

    child: ChildProcess
    ray: Any
    task: Any = None

    def is_alive(self) -> bool:
        waits = self.task is not None and not self.ray.wait([self.task], timeout=0)[0]
        return waits or self.child.is_alive()

    def stop(self) -> None:
        if (self.child.run / "run.json").exists():
            Run(self.child.run).ask_stop()
        elif self.task is not None:
            with suppress(self.ray.exceptions.RayError):
                self.ray.cancel(self.task)  # it may wait for a place; else `stop` comes again with its folder

    def error(self) -> JsonObject | None:
        return self.child.error()


class RayLauncher:
    """Runs on a cluster."""

    def __init__(self, ray: Any, *, offline: bool) -> None:
        self._ray, self._offline = ray, offline

    @property
    def slots(self) -> int:
        """Runs that have a place at once, of one card each, or of one processor where there are no cards."""
        resources = self._ray.cluster_resources()
        return max(1, int(resources.get("GPU", 0) or resources.get("CPU", 1)))

    def start(self, run: Path, recipe: Path, environment: Mapping[str, str]) -> RayRun:
        needs = needs_of(load.validate(orjson.loads(recipe.read_bytes())), self._ray)
        remote = self._ray.remote(max_retries=0, **needs)(hold_place)
        task = remote.remote(run, recipe, dict(environment), self._offline, socket.gethostname())
        return RayRun(ChildProcess(run), self._ray, task)

    def find(self, run: Path) -> RayRun | None:
        ray_run = RayRun(ChildProcess(run), self._ray)
        return ray_run if ray_run.is_alive() else None

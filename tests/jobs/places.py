"""A store, stand-ins for runs and engines, and servers over them without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.jobs.bases import Bases, PublicBase
from tunesmith.jobs.check_process import answer_to
from tunesmith.jobs.dispatcher import Dispatcher
from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.routes import create_job
from tunesmith.jobs.store import Store
from tunesmith.runs.folder import Run
from tunesmith.types import Event

BASES = Bases(bases={"tiny": PublicBase(model="tiny-model", aliases={"gpt-4o-mini": "gpt-4o-mini-2024-07-18"})})
STEPS = 6
SNAPSHOT = 4
"""Step whose result is kept on the way."""


def rows(num: int) -> bytes:
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})
    return b"".join(json.dumps({"messages": turns, "n": i}).encode() + b"\n" for i in range(num))


def pairs(num: int) -> bytes:
    """Preferences as OpenAI has them."""
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    sides = {f"{name}_output": [{"role": "assistant", "content": name}] for name in ("preferred", "non_preferred")}
    return b"".join(json.dumps({"input": asked, **sides, "n": i}).encode() + b"\n" for i in range(num))


def put_file(store: Store, content: bytes, name: str = "file-a") -> str:
    store.content_path(name).write_bytes(content)
    facts = {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": len(content), "sha256": ""}
    store.add_file({"id": name, **facts})
    return name


def put_job(store: Store, file: str, *, bases: Bases = BASES, **body: Any) -> str:
    return str(create_job(store, bases, JobBody(**{"model": "tiny", "training_file": file, **body}))["id"])


@dataclass
class FakeRun:
    """A process that writes a step of its run folder at each look, until it is done, stopped or killed."""

    path: Path
    recipe: Path
    environment: Mapping[str, str]
    stops: bool = False
    is_dead: bool = False

    def is_alive(self) -> bool:
        run = Run(self.path)
        if self.is_dead or run.state() == "done":
            return False
        if not (self.path / "run.json").exists():
            recipe = json.loads(self.recipe.read_text())
            recipe["train"] = {"epochs": 1.0, "rows_per_step": 2}
            Run.create(self.path.parent, "x", json.dumps(recipe), out=self.path)
            choices = [("optim.lr", 0.1, "usual"), ("optim.warmup", 0.03, "short")]
            facts = [dict(zip(("key", "value", "reason"), one, strict=True)) for one in choices]
            plan = {"steps": STEPS, "choices": facts}
            run.append(Event("plan", 0, 1.0, plan, {}))
        done = sum(event.kind == "step" for event in run.events())
        if self.stops:
            self.is_dead = True
            if done:
                (run.snapshots_path / f"step-{done}" / "adapter").mkdir(parents=True, exist_ok=True)
                facts = {"path": f"snapshots/step-{done}", "at": "stop"}
                run.append(Event("snapshot", done, 2.5 + done, facts, {}))
            return False
        if done < STEPS:
            run.append(Event("step", done + 1, 2.0 + done, {"loss": 1.0 / (done + 1), "tokens": 10}, {}))
            if done + 1 == SNAPSHOT:
                run.append(Event("snapshot", SNAPSHOT, 2.5 + done, {"path": f"snapshots/step-{SNAPSHOT}"}, {}))
        else:
            run.append(Event("end", done, 20.0, {"report": ""}, {}))
        return True

    def stop(self) -> None:
        self.stops = True

    def error(self) -> dict[str, Any] | None:
        return {"code": "Stopped", "message": "stopped"} if self.stops else None


@dataclass
class FakeLauncher:
    """Remembers what it started. A process outlives the server that started it, as a child does."""

    started: list[FakeRun] = field(default_factory=list)

    def start(self, run: Path, recipe: Path, environment: Mapping[str, str]) -> FakeRun:
        assert self.find(run) is None, "two processes would work on one run"
        self.started.append(FakeRun(run, recipe, environment))
        return self.started[-1]

    def find(self, run: Path) -> FakeRun | None:
        return next((one for one in self.started if one.path == run and not one.is_dead and _is_open(one)), None)


def _is_open(one: FakeRun) -> bool:
    return not (one.path / "run.json").exists() or Run(one.path).state() != "done"


@dataclass
class FakeModels:
    """What is served."""

    served: dict[str, str] = field(default_factory=dict)

    def attach(self, base: str, name: str, run: Path) -> None:
        self.served[name] = os.fspath(run)

    def detach(self, name: str) -> None:
        self.served.pop(name)


@dataclass
class CheckedHere:
    """A check that is done when it is started."""

    place: Path
    request: Mapping[str, Any]

    def is_alive(self) -> bool:
        return False

    def printed(self) -> dict[str, Any]:
        return answer_to(self.request)

    def stop(self) -> None:
        """It has ended."""

    def forget(self) -> None:
        """It has written nothing."""


def dispatcher(store: Store, launcher: FakeLauncher, models: FakeModels, bases: Bases = BASES) -> Dispatcher:
    working = Dispatcher(store, bases, launcher, models)
    working.checks.start = CheckedHere  # type: ignore[assignment]
    return working

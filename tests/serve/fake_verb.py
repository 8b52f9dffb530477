"""`tunesmith serve` as a process, with an engine that has no model."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from serve.fake import FakeEngine
from tunesmith.cli import main
from tunesmith.cli import serve as server
from tunesmith.errors import InputError


class WorkerEngine(FakeEngine):
    def __init__(self, names: Any, *, root: Any, options: Any, on_note: Any) -> None:
        super().__init__()
        self.names, self.options, self.on_note = names, options, on_note

    async def start(self) -> FakeEngine:
        if "broken" in self.names:
            raise InputError("broken: its prompts are not those of training.")
        self.on_note(f"note: {self.options.streams} streams")
        return self


module = ModuleType("tunesmith.serve.engine")
module.WorkerEngine = WorkerEngine  # type: ignore[attr-defined]
sys.modules["tunesmith.serve.engine"] = module
server.refuse_missing = lambda *target, **how: None  # models of these names are nowhere


def plant(bug: str) -> None:
    """What a server must not do, for tests that have to see it: PLANTED names such bugs."""
    from tunesmith.serve import middleware

    if bug == "faults tell what was asked":
        middleware._where = lambda error: f"RuntimeError at fake.py:1 generate: {error}"
    elif bug == "control characters are written":
        server.one_line = lambda text, width: text
    elif bug == "answers are written":
        right = server.ServerOutput.request

        def request(output: Any, log: Any) -> None:
            output.note(f"{log.method} {FakeEngine.last_said}")
            right(output, log)

        server.ServerOutput.request = request  # type: ignore[method-assign]


if __name__ == "__main__":
    for bug in os.environ.get("PLANTED", "").split("; "):
        plant(bug)
    main()

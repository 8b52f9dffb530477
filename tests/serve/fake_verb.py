"""`tunesmith serve` as a process, with an engine that has no model."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from serve.fake import FakeEngine
from tunesmith.cli import main
from tunesmith.errors import InputError


async def start_engine(names: Any, *, root: Any, options: Any, on_note: Any) -> FakeEngine:
    if "broken" in names:
        raise InputError("broken: its prompts are not those of training.")
    on_note(f"note: {options.streams} streams")
    return FakeEngine()


module = ModuleType("tunesmith.serve.engine")
module.start_engine = start_engine  # type: ignore[attr-defined]
sys.modules["tunesmith.serve.engine"] = module


def plant(bug: str) -> None:
    """What a server must not do, for tests that have to see it: PLANTED names such bugs."""
    from tunesmith.cli import serve as server
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

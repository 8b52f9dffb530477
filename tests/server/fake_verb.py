"""`tunesmith serve` as a process, with an engine that has no model."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from server.fake import FakeEngine
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
    """What a server must not do, for tests that have to see it: PLANTED names it."""
    from tunesmith.cli import serving
    from tunesmith.serve import gate

    if bug == "faults tell what was asked":
        gate._where = lambda error: f"RuntimeError at fake.py:1 ask: {error}"
    elif bug == "control characters are written":
        serving.one_line = lambda text, width: text
    elif bug == "answers are written":
        right = serving.Voice.answered

        def answered(voice: Any, one: Any) -> None:
            voice.note(f"{one.method} {FakeEngine.last_said}")
            right(voice, one)

        serving.Voice.answered = answered  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(os.environ.get("PLANTED", ""))
    main()

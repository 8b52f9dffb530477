"""`tunesmith serve` as a process, with an engine that has no model."""

from __future__ import annotations

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


module = ModuleType("tunesmith.inference.engine")
module.start_engine = start_engine  # type: ignore[attr-defined]
sys.modules["tunesmith.inference.engine"] = module

if __name__ == "__main__":
    main()

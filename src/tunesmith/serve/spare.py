"""A process that has imported what commands need and waits for one: its answer then takes as long as the work.

`python -m tunesmith.serve.spare MODULE…` imports the modules one by one and reads a line of JSON, {module,
words}; with that it is `python -m module words`. Without a line it ends: its server has gone.
"""

from __future__ import annotations

import os
import runpy
import select
import sys
from collections.abc import Iterable
from importlib import import_module

from tunesmith.runs.atomic import from_json

IMPORTS = [
    f"tunesmith.{name}" for name in ("cli.app", "cli.display", "data.check", "inference.load", "training.resolve")
]
"""Modules that commands need, those without torch first."""


def wait(imports: Iterable[str]) -> None:
    """Import, as long as no command is there, and be the command that comes."""
    for name in imports:
        if select.select([sys.stdin], [], [], 0)[0]:
            break  # it imports what it needs
        import_module(name)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    command, code = from_json(line), 0
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [command["module"], *command["words"]]
    try:
        runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking all modules down takes longer than an answer


if __name__ == "__main__":
    wait(sys.argv[1:])

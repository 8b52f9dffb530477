"""Work in a new process: what it holds in memory ends with it, and what ends it leaves this one alive."""

from __future__ import annotations

import subprocess
import sys

from tunesmith.environment import for_child
from tunesmith.errors import ExportError

TIMEOUT_S = 3600.0


def in_new_process(module: str, *words: str, what: str) -> None:
    """Run a module of the package to its end, without a network. `what` begins the sentence that says how it failed.

    Raises ExportError with its last words.
    """
    environment = for_child(HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{what}: not done within {TIMEOUT_S / 60:.0f} minutes: too slow.") from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise ExportError(f"{what}: {last[0][:600]}")

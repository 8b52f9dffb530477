"""This process: its processors, memory, limits and share of a card, and whether it is one of several."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tunesmith.errors import InputError

CARD_SHARE = "TUNESMITH_CARD_SHARE"
"""Variable with the share of a card's memory that a process may take."""
SERVING_SHARE = 0.4
"""The share of a server whose jobs train on the same card; they have the rest."""


def card_share(usual: float = 1.0) -> float:
    """Share of a card's memory for this process; `usual` if the variable is not set. Raises InputError."""
    text = os.environ.get(CARD_SHARE) or usual
    try:
        share = float(text)
    except ValueError as error:
        raise InputError(f"{CARD_SHARE}={text}: no number. Give a share such as 0.4.") from error
    if not 0 < share <= 1:
        raise InputError(f"{CARD_SHARE}={text}: a share of a card is above 0 and at most 1. Give one such as 0.4.")
    return share


def refuse_ranks(environ: Mapping[str, str]) -> None:
    """Raise InputError if torchrun or its like started several processes, for commands that run in one."""
    ranks = environ.get("WORLD_SIZE", "")
    if ranks.isdecimal() and int(ranks) > 1:
        raise InputError(
            f"WORLD_SIZE={ranks}: torchrun or its like started {ranks} processes, but only `tunesmith train` "
            "and `resume` run in several. Start this without a launcher; if there is none, unset WORLD_SIZE."
        )


def num_cpus() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(processes: int = 1) -> tuple[int, str]:
    """Default number of threads, and why: OMP_NUM_THREADS if it is set, else the cores of this process, or its
    share of them where several `processes` train together on this machine."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted), "OMP_NUM_THREADS is set"
    num = num_cpus()
    if processes > 1:
        return max(1, num // processes), f"{num} cores for {processes} processes"
    return num, f"{num} core{'s are' if num > 1 else ' is'} free to this process"


def limit_process(*, memory_bytes: int, seconds: float, grace_s: int = 1) -> None:
    """Let this process have `memory_bytes` and `seconds` of a processor beyond what it has taken: then SIGXCPU,
    and `grace_s` later its end. What a system cannot limit (memory on macOS, anything on Windows) stays
    free."""
    with suppress(ImportError):
        import resource

        with suppress(ValueError, OSError):  # a lower limit is in force
            most = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (until := int(time.process_time() + seconds) + 1, until + grace_s))


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)

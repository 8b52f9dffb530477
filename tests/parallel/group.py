"""Starts a group of gloo processes for tests, without an agent: each runs scenarios, and writes what it found.

    python -m parallel.group FOLDER MODULE SCENARIO ...

is one rank, forked from a process that has imported everything. One that takes too long is
killed, so that nothing hangs.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fresh import Process

LIMIT_S = 150
"""Seconds for all scenarios of one start, on a busy machine."""


def begin(folder: Path, *names: str, size: int = 2, module: str = "parallel.scenarios", **more: Any) -> list[Process]:
    """The processes of a group. `more`: variables of their environment."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(size):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "KILLED": "[]", **more}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with open(folder / f"rank-{rank}.log", "ab") as log:
            words = ("-m", "parallel.group", folder, module, *names)
            ranks.append(Process(*words, env=environment, stdout=log.fileno()))
    return ranks


def finish(ranks: list[Process], limit_s: float) -> None:
    """Wait for all; whoever takes longer is killed."""
    until = time.monotonic() + limit_s
    for rank in ranks:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except TimeoutError:
            with suppress(ProcessLookupError):
                rank.send_signal(signal.SIGKILL)
            rank.wait()


def start(
    folder: Path,
    *names: str,
    size: int = 2,
    module: str = "parallel.scenarios",
    killed: tuple[int, ...] = (),
    limit_s: float = LIMIT_S,
    **more: str,
) -> list[dict[str, Any]]:
    """What each rank found, by scenario: its value, or {"error", "text"}. `killed`: ranks that the last one kills.

    `more`: variables of their environment.
    """
    ranks = begin(folder, *names, size=size, module=module, KILLED=json.dumps(killed), **more)
    finish(ranks, limit_s)
    codes = [rank.returncode for rank in ranks]
    assert codes == [-9 if rank in killed else 0 for rank in range(size)], "".join(
        rank.communicate()[1] for rank in ranks
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    scenarios = importlib.import_module(sys.argv[2])
    from torch.distributed.rendezvous import rendezvous

    from tunesmith.parallel import world

    world.POLL_S, world.WORD_S = 0.005, 0.5
    kept = next(rendezvous("env://"))  # one store for all scenarios
    folder, found = Path(sys.argv[1]), {}
    own = folder / f"rank-{os.environ['RANK']}.json"
    own.write_text("{}")  # of one that is killed in the first
    for attempt, name in enumerate(sys.argv[3:]):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # each scenario is a group of its own
        began = time.perf_counter(), time.process_time()
        try:
            found[name] = getattr(scenarios, name)(folder)
        except Exception as error:
            found[name] = {"error": type(error).__name__, "text": str(error)}
        own.write_text(json.dumps(found))
        print(f"{name}: {time.perf_counter() - began[0]:.1f} s, {time.process_time() - began[1]:.1f} s of a processor")
    kept[0].set(f"done/{os.environ['RANK']}", "")
    if kept[1] == 0:  # whose store it is
        kept[0].wait([f"done/{rank}" for rank in range(kept[2]) if rank not in json.loads(os.environ["KILLED"])])


if __name__ == "__main__":
    main()

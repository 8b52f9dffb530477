"""Runs that are killed at random moments, again and again, until enough kills were had."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fresh
from tiny_run import same_run
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import resume, train

RUN = """
import sys
from pathlib import Path
from tunesmith.recipe.load import load
from tunesmith.runs.folder import runs
from tunesmith.training.trainer import Listener, resume, train
recipe, root = sys.argv[1], Path(sys.argv[2])
resume(made[0]) if (made := runs(root)) else train(load(recipe), root=root)
"""


def kill_runs(
    folder: Path, recipe: Recipe, *, kills: int, seed: int, straight: Callable[[Run], Run] | None = None
) -> tuple[int, int]:
    """(kills, runs finished): SIGKILL at random moments, over as many runs as it takes. AssertionError where one does
    not end with the bits of a run that nothing happens to. `straight`: makes the run that a finished one has to be;
    None: one for all."""
    path = folder / "recipe.yaml"
    path.write_text(as_yaml(recipe, comments=False))
    once = train(recipe, root=folder / "straight") if straight is None else None
    words = ("-c", RUN, path, folder / "runs")
    fresh.done("-c", "pass")  # what is imported is not what is killed
    begun = time.perf_counter()
    fresh.done(*words)  # one that is left alone tells how long a new process takes
    seconds = time.perf_counter() - begun
    shutil.rmtree(runs(folder / "runs")[0].path)
    draw, killed, finished = random.Random(seed), 0, 0
    while killed < kills:
        process = fresh.Process(*words)
        time.sleep(draw.uniform(0, seconds))
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        killed += process.returncode != 0
        made = runs(folder / "runs")
        if made and made[0].state() == "done":
            same_run(made[0], once or straight(made[0]))
            finished += 1
            shutil.rmtree(made[0].path)
    if made := runs(folder / "runs"):
        done = resume(made[0])
        same_run(done, once or straight(done))
        finished += 1
    return killed, finished

"""Training itself, killed three times, with every installed tracker at once."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tiny_run import tiny_recipe
from trackers.stores import READ, Points, logged, missing
from tunesmith.environment.children import for_child
from tunesmith.recipe.docs import as_yaml
from tunesmith.runs.folder import Run
from tunesmith.trackers.sender import read_state

TIMED = {"train/seconds", "train/tokens_per_second", "train/peak_bytes"}
KILLS = (40, 90, 170)
"""Steps after which the process is killed."""


def same_again(points: Points) -> Points:
    """Without what a repeated step measures anew."""
    return Counter({point: num for point, num in points.items() if point[0] not in TIMED})


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tunesmith", *words]
    return subprocess.Popen(command, env=for_child(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_of(run: Run) -> int:
    return max((event.step for event in run.events() if event.kind == "step"), default=0)


@pytest.mark.slow
def test_a_run_killed_three_times_is_in_every_tracker_exactly_once(tmp_path: Path) -> None:
    names = [name for name in READ if not missing(name)]
    if not names:
        pytest.skip("no tracker is installed")
    every = {"evaluation": {"every": 7}, "train": {"epochs": 40}, "checkpoint": {"every": 15}, "track": names}
    (tmp_path / "recipe.yaml").write_text(as_yaml(tiny_recipe(tmp_path, **every), comments=False), "utf-8")
    run = Run(tmp_path / "runs" / "killed")
    process = start("train", "--recipe", "recipe.yaml", "--out", str(run.path))
    for step in KILLS:
        while steps_of(run) < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.kill()
        process.wait()
        process = start("resume", str(run.path))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert len([event for event in run.events() if event.kind == "resume"]) == len(KILLS)
    for name in names:
        assert read_state(run, name)["done"], said
        found, wanted = READ[name](run), logged(run, name)
        assert same_again(found) == same_again(wanted)
        assert {(name, step) for name, step, _ in found} == {(name, step) for name, step, _ in wanted}
        assert max(found.values()) == 1
        assert len(found) == len(wanted)

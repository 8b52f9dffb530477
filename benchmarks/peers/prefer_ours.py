"""Our side of `python -m benchmarks preferences`.

python prefer_ours.py GIVEN.json RESULT.json
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from given_rows import run
from prefer_start import recipe_of

from tunesmith.environment.settings import prepare_environment


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "reference_seconds" a step, "tokens" of
    each, "tuned"}."""
    prepare_environment(os.environ)  # as the command line does for its runs
    from tunesmith.training import trainer

    clock = {"plan": 0.0, "reference": 0.0}

    def note(what: str, done: int, total: int) -> None:
        if what == "reference":
            clock[what] = time.perf_counter()

    def hear(event: Any) -> None:
        if event.kind == "plan":  # the reference is next
            clock["plan"] = time.perf_counter()

    begun = time.perf_counter()
    listener = trainer.Listener(on_event=hear, on_progress=note)
    tuned = trainer.train(recipe_of(job), root=Path(job["folder"]) / "runs", listener=listener)
    events = list(tuned.events())
    steps = [event for event in events if event.kind == "step"]
    (rows,) = [event.values["report"]["rows"] for event in events if event.kind == "end"]
    pairs = rows["train"] + rows["held_out"]
    return {
        "losses": [event.values["loss"] for event in steps],
        "seconds": [event.timing["seconds"] for event in steps],
        "reference_seconds": (clock["reference"] - clock["plan"]) / pairs * job["pairs_per_step"],
        "run_seconds": time.perf_counter() - begun,
        "tokens": [event.values["tokens"] for event in steps],
        "tuned": str(tuned.adapter_path),
    }


if __name__ == "__main__":
    run(train)

"""The heaviest step of a run, a usual one, one evaluation batch, a few words of an answer and one save, measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith import checkpoint
from tunesmith.describing import peak_memory_bytes
from tunesmith.evaluation.measure import evaluate
from tunesmith.forecasting import OnProgress
from tunesmith.generation import Sampling, answer
from tunesmith.loop import training_steps
from tunesmith.planning.devices import CUDA_CONTEXT
from tunesmith.planning.heaviest import heaviest, heaviest_looked
from tunesmith.preparing import Setup
from tunesmith.probing.found import Timed

LONG_S = 60.0
"""A step that takes longer is the only one: what the first one has compiled weighs nothing in it."""
USUAL, USUAL_S = 4, 30.0
"""Steps of usual size, and seconds after which none is added: one alone says little, and the heap grows with the shapes
of the first few."""
MORE, MORE_S = 16, 4.0
"""Most steps of usual size where they are short, until so many seconds have gone by: the first are slower than most."""
LOOKED_AT = 64
"""Steps among which a usual one is looked for."""
FEW_WORDS, MORE_WORDS = 2, 10

Tell = Callable[[dict[str, Any]], None]


def measure(setup: Setup, folder: Path, *, tell: Tell, on_progress: OnProgress) -> None:
    """Live through it, and tell of each piece as soon as it is over. A checkpoint is written into `folder`.

    Raises what a run would: OutOfMemoryError, NonFiniteError, StorageError.
    """
    _take_steps(setup, tell, on_progress)
    stages: list[Callable[[], dict[str, Any] | None]] = [
        lambda: _evaluation(setup),
        lambda: _word(setup),
        lambda: _save(setup, folder),
    ]
    for number, stage in enumerate(stages):
        on_progress("probe", 1 + number, 1 + len(stages))
        tell({**(stage() or {}), "peak": peak(setup.device)})
    on_progress("probe", 1 + len(stages), 1 + len(stages))


def _take_steps(setup: Setup, tell: Tell, on_progress: OnProgress) -> None:
    heavy, *usual = _steps(setup)
    on_progress("probe", 0, 4)
    begun = time.perf_counter()
    tell({**_step(setup, heavy, tell), "peak": peak(setup.device)})
    if time.perf_counter() - begun > LONG_S:
        return
    begun = time.perf_counter()
    for number, step in enumerate(usual, start=1):
        tell({**_step(setup, step, tell), "peak": peak(setup.device)})
        spent = time.perf_counter() - begun
        if spent > USUAL_S or (number >= USUAL and spent > MORE_S):
            return


def peak(device: str) -> int:
    """Most bytes that this process has held. On Linux its own alone: what the kernel tells of a process by other ways
    begins with what its parent held."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    try:
        text = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return peak_memory_bytes(device)
    most = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(most[1]) * 1024 if most else peak_memory_bytes(device)


def _steps(setup: Setup) -> list[int]:
    """The heaviest step, and others that are nearest to the mean in tokens."""
    plan, steps = setup.plan, setup.total_steps
    heavy = heaviest(plan, steps, setup.rows.store.denominators)[0] if setup.forecast is None else setup.forecast.heavy
    lengths = setup.rows.store.lengths
    tokens = {
        step: sum(int(lengths[i]) for rows in plan.step(step) for i in rows)
        for step in range(1, min(steps, LOOKED_AT) + 1)
        if step != heavy.step
    }
    mean = float(plan.lengths_I @ plan.weights_I) / plan.steps_per_epoch
    return [heavy.step, *sorted(tokens, key=lambda step: abs(tokens[step] - mean))[:MORE]]


def _step(setup: Setup, step: int, tell: Tell) -> dict[str, Any]:
    event = next(training_steps(setup, start=step - 1))
    if (halved := event.values.get("tokens_per_pass")) is not None:
        tell({"notes": f"memory ended in step {step}: its passes had to be of {halved:,} tokens"})
    return {"steps": asdict(Timed(event.timing["seconds"], tokens=event.values["tokens"], step=step))}


def _evaluation(setup: Setup) -> dict[str, Any] | None:
    rows = [int(i) for i in setup.rows.held_rows]
    if not rows:
        return None
    store, tokens = setup.rows.held_store, setup.plan.tokens_per_pass
    members = heaviest_looked(store, rows, tokens_per_pass=tokens, layout=setup.plan.layout)
    begun = time.perf_counter()
    evaluate(setup.model, setup.task, setup.held_feed, members, tokens_per_pass=tokens)
    seconds = time.perf_counter() - begun
    return {"evaluation": asdict(Timed(seconds, tokens=int(np.sum(store.lengths[list(members)]))))}


def _word(setup: Setup) -> dict[str, Any] | None:
    """What an answer of more words takes longer than one of few."""
    if not setup.samples:
        return None
    prompts = [sample.ids for sample in setup.samples[:8]]
    taken = []
    for words in (FEW_WORDS, MORE_WORDS):
        begun = time.perf_counter()
        answer(setup.model, setup.renderer, prompts, Sampling(max_new_tokens=words))
        taken.append(time.perf_counter() - begun)
    return {"word": asdict(Timed(max(0.0, taken[1] - taken[0]) / (MORE_WORDS - FEW_WORDS)))}


def _save(setup: Setup, folder: Path) -> dict[str, Any]:
    begun = time.perf_counter()
    made = checkpoint.save(folder, 1, weights=setup.attachment.trained, optimizer=setup.update.state(), state={})
    seconds = time.perf_counter() - begun
    return {"save": asdict(Timed(seconds, num_bytes=sum(path.stat().st_size for path in made.iterdir())))}

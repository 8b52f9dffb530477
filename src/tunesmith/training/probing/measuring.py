"""The heaviest step of a run and usual ones, and of every other kind of its work a part, measured."""

# I rows, P passes

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.collate import Collator
from tunesmith.data.sampler import MicroBatch, micro_batches_of
from tunesmith.evaluation.forgetting import general_rows, text_batches
from tunesmith.evaluation.generate import ANSWER_BATCH, Sampling, generate
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.evaluation.report import smoke_test
from tunesmith.methods import state_dict
from tunesmith.models.machine import peak_memory_bytes
from tunesmith.models.modes import eval_mode
from tunesmith.planning.counting import Amount, amount, seen_rows
from tunesmith.planning.devices import CUDA_CONTEXT
from tunesmith.planning.heaviest import heaviest, heaviest_looked
from tunesmith.recipe.schema import resolved
from tunesmith.runs import checkpoint
from tunesmith.training.loop import training_steps
from tunesmith.training.probing.found import Timed
from tunesmith.training.resolve import OnProgress
from tunesmith.training.setup import Setup
from tunesmith.training.summary import length_histogram

LONG_S = 60.0
"""A step that takes longer is the only one: what the first one has compiled weighs nothing in it."""
USUAL, USUAL_S = 4, 30.0
"""Steps of usual size, and seconds after which none is added: one alone says little, and the heap grows with the shapes
of the first few."""
MORE, MORE_S = 16, 4.0
"""Most steps of usual size where they are short, until so many seconds have gone by: the first are slower than most."""
LOOKED_AT = 64
"""Steps among which a usual one is looked for."""
LOOKS, LOOKS_S = 6, 4.0
"""Passes over rows of one kind, and seconds after which none is added."""
FEW_WORDS, MORE_WORDS = 2, 10

T = TypeVar("T")
Tell = Callable[[dict[str, Any]], None]


def measure(setup: Setup, folder: Path, *, tell: Tell, on_progress: OnProgress) -> None:
    """Live through it, and tell of each piece as soon as it is over. A checkpoint is written into `folder`.

    Raises what a run would: OutOfMemoryError, NonFiniteError, StorageError.
    """
    stages: list[Callable[[], dict[str, Any]]] = [
        lambda: _held_out(setup),
        lambda: _surprising(setup),
        lambda: _general(setup),
        lambda: _word(setup),
        lambda: _save(setup, folder),
        lambda: _finish(setup, folder),
    ]
    on_progress("probe", 0, 1 + len(stages))
    _take_steps(setup, tell)
    for number, stage in enumerate(stages, start=1):
        on_progress("probe", number, 1 + len(stages))
        tell({**stage(), "peak": peak(setup.device)})
    on_progress("probe", 1 + len(stages), 1 + len(stages))


def _take_steps(setup: Setup, tell: Tell) -> None:
    heavy, *usual = _steps(setup)
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
    return {"steps": asdict(Timed(event.timing["seconds"], event.values["tokens"], step=step))}


def _held_out(setup: Setup) -> dict[str, Any]:
    rows = setup.rows.held_rows
    return {"held_out": asdict(_looks(setup, setup.held_feed, rows))} if len(rows) else {}


def _surprising(setup: Setup) -> dict[str, Any]:
    rows = seen_rows(setup.recipe, setup.rows)
    return {"surprising": asdict(_looks(setup, setup.feed, rows))} if len(rows) else {}


def _looks(setup: Setup, feed: Collator, rows_I: NDArray[np.int64]) -> Timed:
    """Passes over these rows of a feed: the heaviest one, in which memory is most, and then usual ones."""
    rows = [int(i) for i in rows_I]
    tokens, layout = setup.plan.tokens_per_pass, setup.plan.layout
    _look(setup, feed, heaviest_looked(feed.store, rows, tokens_per_pass=tokens, layout=layout))
    passes = micro_batches_of(feed.store, rows, tokens_per_pass=tokens, layout=layout)
    amounts = [amount(feed.store, np.asarray(members)) for members in passes]
    return _usual(lambda members: _look(setup, feed, members), passes, amounts)


def _look(setup: Setup, feed: Collator, members: MicroBatch) -> None:
    predict_rows(setup.model, setup.task, feed, members, tokens_per_pass=setup.plan.tokens_per_pass)


def _general(setup: Setup) -> dict[str, Any]:
    if not (resolved(setup.recipe.evaluation.general) and setup.can_generate):
        return {}
    rows = general_rows(setup.renderer.tokenizer)
    batches = [batch for _, batch in text_batches(rows, layout=setup.plan.layout, device=setup.device)]
    amounts = [Amount(batch.num_tokens, batch.num_targets) for batch in batches]
    with eval_mode(setup.model):
        found = _usual(lambda batch: setup.task.measure(setup.model, batch).losses_N.cpu(), batches, amounts)
    return {"general": asdict(found)}


def _usual(do: Callable[[T], object], passes: Sequence[T], amounts: Sequence[Amount]) -> Timed:
    """Some passes, those first that are nearest to the mean in tokens and in targets; the count is their tokens."""
    amounts_P2 = np.asarray([(one.tokens, one.targets) for one in amounts], np.float64)
    means_2 = np.maximum(1.0, amounts_P2.mean(axis=0))
    seconds = tokens = 0.0
    for p in np.argsort(np.abs(amounts_P2 / means_2 - 1).sum(axis=1), kind="stable")[:LOOKS]:
        begun = time.perf_counter()
        do(passes[p])
        seconds, tokens = seconds + time.perf_counter() - begun, tokens + amounts[p].tokens
        if seconds > LOOKS_S:
            break
    return Timed(seconds, tokens)


def _word(setup: Setup) -> dict[str, Any]:
    """What an answer of more words takes longer than one of few."""
    if not setup.samples:
        return {}
    prompts = [sample.ids for sample in setup.samples[:ANSWER_BATCH]]
    taken = []
    for words in (FEW_WORDS, FEW_WORDS, MORE_WORDS):  # the first answer of all is slower
        begun = time.perf_counter()
        generate(setup.model, setup.renderer, prompts, Sampling(max_new_tokens=words))
        taken.append(time.perf_counter() - begun)
    return {"answering": asdict(Timed(max(0.0, taken[2] - taken[1]), MORE_WORDS - FEW_WORDS))}


def _save(setup: Setup, folder: Path) -> dict[str, Any]:
    begun = time.perf_counter()
    made = checkpoint.save(folder, 1, weights=state_dict(setup.attachment), optimizer=setup.optimizer.state(), state={})
    seconds = time.perf_counter() - begun
    return {"saving": asdict(Timed(seconds, num_bytes=sum(path.stat().st_size for path in made.iterdir())))}


def _finish(setup: Setup, folder: Path) -> dict[str, Any]:
    """The result, which is smoke_testd and written, and a report without its numbers."""
    begun = time.perf_counter()
    setup.save_result(folder / "result")
    written = time.perf_counter() - begun
    smoke_test(length_histogram(setup))
    return {"finishing": asdict(Timed(written + time.perf_counter() - begun))}

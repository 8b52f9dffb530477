"""The probe: a child process that tries a run's heaviest step, usual steps and a part of all its other work.

    python -m tunesmith.training.probe

is the child. It reads what to try from its standard input, and keeps what it measured in a file after each
piece, so that a probe which is killed loses nothing. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter

from tunesmith.data.sampler import micro_batches_of
from tunesmith.environment.children import for_child, python_words
from tunesmith.errors import OutOfMemoryError, TunesmithError, is_out_of_memory
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.evaluation.report import smoke_test
from tunesmith.generation.writer import written_together
from tunesmith.models.image_features import kept_vectors
from tunesmith.models.memory import peak_memory_bytes
from tunesmith.planning.devices import CUDA_CONTEXT
from tunesmith.planning.drawn import draws_of
from tunesmith.planning.forecast import Duration, Forecast, Kind, heaviest, targets_of
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.runs.atomic import remove, temporary_folder, write_atomic
from tunesmith.training.answers import continuation, writer_of
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import length_histogram
from tunesmith.training.teacher import stand_in
from tunesmith.types import JsonObject, OnProgress

STEP_SPREAD = 0.3
"""Share by which a total after a probe may be off, either way."""
LONGEST_S = 600.0
"""A probe that takes longer is ended; what it measured until then counts."""
USUAL_STEPS, USUAL_S = 4, 30.0
"""Steps of usual size, and seconds after which none is added."""
MORE, MORE_S = 16, 4.0
"""Most steps of usual size if they are short, and seconds after which none is added; the first are slower."""
SETTLED_STEPS = 8
"""Steps of usual size that count, the last ones."""
STEPS_LOOKED_AT = 64
"""Steps that are searched for steps of usual size."""
HELD_OUT_PASSES, HELD_OUT_S = 6, 4.0
"""Micro-batches of held-out rows besides the heaviest one, and seconds after which none is added."""
TEACHER_ROWS, TEACHER_ROWS_AT_ONCE = 24, 8
"""Rows that a teacher reads, and how many of them before the time is checked."""
SHORT_ANSWER, LONG_ANSWER = 2, 10
"""Tokens of two answers, whose times differ by the price of a token."""
KILLED = "the system killed it, as it does where memory ends"
MEASURED_FILE = "measured"
"""File of the probe's folder with what it found."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Work that was measured."""

    seconds: float
    count: float = 1
    """Times that it was done; of a step its tokens."""
    step: int = 0
    """Number of the step in the run; 0: none."""


@dataclass
class Found:
    """Measurements of a probe, as far as it came."""

    steps: list[Timed] = field(default_factory=list)
    """The heaviest step, then some of usual size."""
    work: dict[Kind, Timed] = field(default_factory=dict)
    """A measured part of each other kind of work."""
    peak: int = 0
    """Most bytes held until now."""
    notes: list[str] = field(default_factory=list)
    draws: int = 0
    """Number of steps that learn from one draw of answers; 0: rows have answers."""
    ended: str = ""
    """Why it ended early; empty: it did not."""

    def duration(self, forecast: Forecast | None, mean_tokens: float) -> Duration | None:
        """The duration of the whole run: the forecast's counts at the measured prices. None without a forecast
        or a measured step. `mean_tokens`: of a step."""
        if not self.steps or forecast is None or forecast.duration is None:
            return None
        counted = self._usual()
        step = sum(timed.seconds for timed in counted) / len(counted)
        if not self.draws:
            step *= mean_tokens * len(counted) / sum(timed.count for timed in counted)
        prices: dict[Kind, float] = {kind: timed.seconds / timed.count for kind, timed in self.work.items()}
        spread = forecast.duration.spread if self.ended else STEP_SPREAD
        all_prices = {**forecast.duration.prices, **prices, "training": step}
        return replace(forecast.duration, prices=all_prices, spread=spread)

    def _usual(self) -> list[Timed]:
        """The last steps of usual size. Steps that learn from one draw count together or not at all."""
        steps_of_draw = max(1, self.draws)
        num_counted = SETTLED_STEPS // steps_of_draw * steps_of_draw
        return self.steps[steps_of_draw:][-num_counted:] or self.steps

    def values(self, forecast: Forecast | None, mean_tokens: float) -> JsonObject:
        """The measurements as JSON. `memory`: the peak; 0 if the probe ended before a step."""
        duration = self.duration(forecast, mean_tokens)
        seconds = None if duration is None else duration.values()
        return {**asdict(self), "memory": self.peak if self.steps else 0, "seconds": seconds}


_JSON = TypeAdapter(Found)


def probe(recipe: Recipe, *, root: Path, offline: bool, on_progress: OnProgress, limit_s: float = LONGEST_S) -> Found:
    """Try the heaviest moments of a run whose every "auto" is decided. Nothing of it stays below `root`.

    An error that ends the child is not raised: `Found.ended` names it.
    """
    folder = temporary_folder(root, "probe")
    request: JsonObject = {"root": str(root), "folder": str(folder), "offline": offline}
    request |= {"parent": os.getpid(), "born": time.time()}
    # The forecast has refused by now what does not fit. The probe shows what happens.
    request["recipe"] = {**recipe.model_dump(mode="json"), "memory": "warn"}
    on_progress("probe", 0, 1)
    try:
        with open(folder / "printed", "w+b") as printed:
            try:
                code = subprocess.run(  # which ends the child at an error and at Ctrl-C, too
                    python_words("tunesmith.training.probe"),
                    check=False,
                    input=json.dumps(request).encode(),
                    stdout=printed,
                    stderr=printed,
                    env=for_child(),
                    start_new_session=True,  # Ctrl-C reaches this process alone
                    timeout=limit_s,
                ).returncode
                ended = _why_it_ended(code, folder / "printed")
            except subprocess.TimeoutExpired:
                ended = f"it was not done within {limit_s:,.0f} s"
        measured = folder / MEASURED_FILE
        result = _JSON.validate_json(measured.read_bytes()) if measured.exists() else Found()
        result.ended = result.ended or ended
        return result
    finally:
        remove(folder)
        on_progress("probe", 1, 1)


def _why_it_ended(code: int, printed: Path) -> str:
    """Why the child ended early, in words; empty: it did not."""
    lines = [line for line in printed.read_text("utf-8", "replace").splitlines() if line.strip()]
    if code == -9:  # SIGKILL, which Windows does not have
        return KILLED
    return "" if code == 0 else f"exit code {code}{': ' + lines[-1][:300] if lines else ''}"


def main() -> None:
    """Run as the child: measure what standard input asks for."""
    request, result = json.load(sys.stdin), Found()
    folder = Path(request["folder"])
    threading.Thread(target=_end_with, args=(request["parent"], folder), daemon=True).start()
    try:
        setup = prepare(validate(request["recipe"]), root=Path(request["root"]), offline=request["offline"])
        result.work["starting"] = Timed(time.time() - request["born"])
        for _ in measure(setup, folder, result):
            result.peak = peak(setup.device)
            write_atomic(folder / MEASURED_FILE, _JSON.dump_json(result))
    except (TunesmithError, MemoryError, RuntimeError) as error:
        if not isinstance(error, TunesmithError) and not is_out_of_memory(error):
            raise
        says_all = isinstance(error, TunesmithError) and not isinstance(error, OutOfMemoryError)
        result.ended = str(error) if says_all else f"memory ended: {error}"
        write_atomic(folder / MEASURED_FILE, _JSON.dump_json(result))


def _end_with(parent: int, folder: Path) -> None:
    """End this process and remove its folder when its parent ends."""
    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(0.5)
    try:
        remove(folder)
    finally:
        os._exit(1)


def measure(setup: Setup, folder: Path, result: Found) -> Iterator[None]:
    """Measure the work of a run piece by piece, and yield whenever `result` has another one. A checkpoint and a
    result are written into `folder`.

    Raises what a run would: OutOfMemoryError, NonFiniteError, StorageError.
    """
    if (taught := _teach(setup)) is not None:
        result.work["teaching"] = taught
        yield
    stand_in(setup.teacher, setup.rows, int(setup.rows.store.lengths.max()))
    yield from _take_steps(setup, result)
    if (rows := _measure_rows(setup)) is not None:
        result.work["measuring"] = rows
        yield
    if (vectors := kept_vectors(setup.model)).seconds:
        result.work["seeing"] = Timed(vectors.seconds, vectors.computed)
    if setup.samples:
        result.work["answering"] = _answer(setup)
        yield
    began = time.perf_counter()
    checkpoint.save(folder, 1, weights=setup.attachment.trained, optimizer=setup.optimizer.state(), state={})
    result.work["saving"] = Timed(time.perf_counter() - began)
    yield
    began = time.perf_counter()
    setup.save_result(folder / "result")
    saved_s = time.perf_counter() - began  # counted twice: a run rehearses its result before it writes it
    smoke_test(length_histogram(setup))  # a report without its numbers
    result.work["finishing"] = Timed(saved_s + time.perf_counter() - began)
    yield


def peak(device: str) -> int:
    """Most bytes that this process has held; on a card with its context."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    return peak_memory_bytes(device)


def _take_steps(setup: Setup, result: Found) -> Iterator[None]:
    """Take the heaviest step, and others whose tokens are nearest to the mean."""
    sampler, steps = setup.sampler, setup.total_steps
    heavy = setup.forecast.heavy if setup.forecast else heaviest(sampler, steps, setup.rows.store)
    mean = float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch
    others = [step for step in range(1, min(steps, STEPS_LOOKED_AT) + 1) if step != heavy.step]
    usual = sorted(others, key=lambda step: abs(sum(setup.rows.store.lengths[sampler.rows(step)]) - mean))[:MORE]
    draws, vectors = draws_of(setup.recipe), kept_vectors(setup.model)
    spent, steps_of_draw = 0.0, draws.steps if draws else 1
    result.draws = steps_of_draw if draws else 0
    for number, wanted in enumerate([heavy.step, *usual]):
        start = wanted - 1 - (wanted - 1) % steps_of_draw  # steps that share a draw are taken together
        seeing_s = vectors.seconds
        for event in islice(training_steps(setup, start=start), steps_of_draw):
            if (halved := event.values.get("tokens_per_pass")) is not None:
                result.notes.append(f"memory ended in step {event.step}: its passes had to be of {halved:,} tokens")
            seconds = event.timing["seconds"] - (vectors.seconds - seeing_s)  # a run sees each image once
            seeing_s = vectors.seconds
            result.steps.append(Timed(seconds, event.values["tokens"], step=event.step))
            if setup.drawing is not None and draws and "draw" in event.timing:
                _add(result, "answering", Timed(event.timing["draw"], draws.words()))
                _add(result, "grading", Timed(event.timing["grade"], draws.answers))
            yield
            spent += seconds if number else seconds / 2  # after a heaviest step of a minute no other is taken
        if spent > USUAL_S or (number >= USUAL_STEPS and spent > MORE_S):
            return


def _add(result: Found, kind: Kind, timed: Timed) -> None:
    before = result.work.get(kind, Timed(0.0, 0))
    result.work[kind] = Timed(before.seconds + timed.seconds, before.count + timed.count)


def _teach(setup: Setup) -> Timed | None:
    """Let the teacher read some rows, as it does before the first step; None: there is no teacher."""
    teacher, rows = setup.teacher, setup.rows
    if teacher is None:
        return None
    store, rows_I = rows.sides[1 if teacher.options.on_policy else 0]
    sample = [store.row(int(row)) for row in rows_I[:: max(1, len(rows_I) // TEACHER_ROWS)][:TEACHER_ROWS]]
    seconds, tokens = 0.0, 0
    for start in range(0, len(sample), TEACHER_ROWS_AT_ONCE):
        began, part = time.perf_counter(), sample[start : start + TEACHER_ROWS_AT_ONCE]
        for _ in teacher.lists(part):
            pass
        if start or len(sample) <= TEACHER_ROWS_AT_ONCE:  # the very first are slower
            seconds += time.perf_counter() - began
            tokens += sum(len(row.ids) for row in part)
        if seconds > HELD_OUT_S:
            break
    return Timed(seconds, tokens) if tokens else None


def _measure_rows(setup: Setup) -> Timed | None:
    """Measure micro-batches of held-out rows, if there are any: the one that needs the most memory, and then
    others."""
    collator, rows, sampler = setup.held_collator, [int(i) for i in setup.rows.held_rows], setup.sampler
    options: dict[str, Any] = {"layout": sampler.layout, "device": setup.device}
    passes = micro_batches_of(collator.store, rows, tokens_per_pass=sampler.tokens_per_pass, **options)
    if not passes or setup.drawing is not None:  # a run that draws answers measures by answers instead
        return None
    targets_I, seconds, tokens = targets_of(collator.store), 0.0, 0
    heavy = max(passes, key=lambda members: float(targets_I[list(members)].sum()))
    probed = [heavy, *passes[:: max(1, len(passes) // HELD_OUT_PASSES)][:HELD_OUT_PASSES]]
    for number, members in enumerate(probed):
        began, seeing_s = time.perf_counter(), kept_vectors(setup.model).seconds
        predict_rows(setup.model, setup.task, collator, members, tokens_per_pass=sampler.tokens_per_pass)
        if number:
            seconds += time.perf_counter() - began - (kept_vectors(setup.model).seconds - seeing_s)
            tokens += int(collator.store.lengths[list(members)].sum())
        if seconds > HELD_OUT_S:
            break
    return Timed(seconds, tokens)


def _answer(setup: Setup) -> Timed:
    """Time the next token of as many answers as are written together, to held-out rows or to prompts."""
    writer = replace(writer_of(setup), new_tokens=LONG_ANSWER, is_endless=True)
    if (writing := continuation(setup, "after")) is not None:
        lengths = [int(setup.rows.held_store.lengths[row]) for row in writing.wanted]
        rows = list(writing.wanted)[: written_together(max(lengths, default=0) + LONG_ANSWER, writer.cache)]
        writing, tokens = replace(writing, writer=writer), setup.sampler.tokens_per_pass
        predict_rows(setup.model, setup.task, setup.held_collator, rows, tokens_per_pass=tokens, answering=writing)
        if writing.answers and writing.seconds:
            return Timed(writing.seconds, LONG_ANSWER)
    longest = max(len(sample.ids) for sample in setup.samples)
    prompts = [sample.ids for sample in setup.samples[: written_together(longest + LONG_ANSWER, writer.cache)]]
    seconds = list[float]()
    for new_tokens in (SHORT_ANSWER, SHORT_ANSWER, LONG_ANSWER):  # the very first answer is slower
        writer = replace(writer, new_tokens=new_tokens)
        began = time.perf_counter()
        writer.write(prompts)
        seconds.append(time.perf_counter() - began)
    return Timed(max(0.0, seconds[2] - seconds[1]), LONG_ANSWER - SHORT_ANSWER)


if __name__ == "__main__":
    main()

"""The probe: the heaviest step of a run, usual ones and a part of everything else, tried before the run in a child.

    python -m tunesmith.training.probe

is the child. It reads what to try from its standard input, one line of JSON, and writes what it measured to its
standard output, one line a piece, so that a probe which is killed loses nothing. It ends when its input ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.sampler import micro_batches_of
from tunesmith.environment import for_child
from tunesmith.errors import OutOfMemoryError, TunesmithError, is_out_of_memory
from tunesmith.evaluation.generate import ANSWER_BATCH, generate
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.evaluation.report import smoke_test
from tunesmith.models.machine import peak_memory_bytes
from tunesmith.planning.devices import CUDA_CONTEXT
from tunesmith.planning.duration import KINDS, Duration, Kind, targets_of
from tunesmith.planning.forecast import Forecast, heaviest
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.runs.atomic import remove, temporary_folder
from tunesmith.training.loop import training_steps
from tunesmith.training.resolve import OnProgress
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import length_histogram

SPREAD = 0.15
"""Share by which a total after a probe may be off, either way."""
LIMIT_S = 600.0
"""A probe that takes longer is ended; what it measured until then counts."""
USUAL, USUAL_S = 4, 30.0
"""Steps of usual size, and seconds after which none is added."""
MORE, MORE_S = 16, 4.0
"""Most steps of usual size where they are short, and seconds after which none is added: the first are slower."""
SETTLED = 8
"""Steps of usual size that count, the last ones."""
LOOKED_AT = 64
"""Steps among which those of usual size are looked for."""
LOOKS, LOOKS_S = 6, 4.0
"""Micro-batches of held-out rows besides the heaviest one, and seconds after which none is added."""
FEW_WORDS, MORE_WORDS = 2, 10
KILLED = "the system killed it, as it does where memory ends"

Tell = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that was done."""

    seconds: float
    count: float = 1
    """Repetitions; the tokens of a step."""
    step: int = 0
    """Number of the step in the run; 0: none."""


@dataclass
class Found:
    """Measurements of a probe, as far as it came."""

    steps: list[Timed] = field(default_factory=list)
    """The heaviest one, then some of usual size."""
    work: dict[Kind, Timed] = field(default_factory=dict)
    """A part of each other kind of work."""
    peak: int = 0
    """Most bytes held until now."""
    notes: list[str] = field(default_factory=list)
    ended: str = ""
    """Why it came no further; empty: it came to its end."""

    def hear(self, name: str, value: Any) -> None:
        """Take a line of the child: the name of a field, or a kind of work, and its value.

        Raises ValueError for another name.
        """
        if name == "step":
            self.steps.append(Timed(**value))
        elif name == "note":
            self.notes.append(value)
        elif name in ("peak", "ended"):
            setattr(self, name, value)
        else:
            self.work[KINDS[KINDS.index(name)]] = Timed(**value)

    def duration(self, forecast: Forecast | None, mean_tokens: float) -> Duration | None:
        """The whole run at the measured prices; None without a step or a forecast, which has the counts.

        `mean_tokens`: of a step.
        """
        if not self.steps or forecast is None or forecast.duration is None:
            return None
        counted = self.steps[1:][-SETTLED:] or self.steps
        step = mean_tokens * sum(one.seconds for one in counted) / sum(one.count for one in counted)
        prices: dict[Kind, float] = {kind: one.seconds / one.count for kind, one in self.work.items()}
        spread = forecast.duration.spread if self.ended else SPREAD
        return Duration(forecast.duration.counts, {**forecast.duration.prices, **prices, "training": step}, spread)

    def values(self, forecast: Forecast | None, mean_tokens: float) -> dict[str, Any]:
        """As JSON. `memory`: the peak, 0 where it ended before a step."""
        duration = self.duration(forecast, mean_tokens)
        seconds = None if duration is None else duration.values()
        return {**asdict(self), "memory": self.peak if self.steps else 0, "seconds": seconds}


def probe(recipe: Recipe, *, root: Path, offline: bool, on_progress: OnProgress, limit_s: float = LIMIT_S) -> Found:
    """Try the heaviest moments of a run whose every "auto" is decided. Nothing of it stays below `root`.

    Never raises for what ends the child: `Found.ended` says it.
    """
    folder, found = temporary_folder(root, "probe"), Found()
    # Whether it fits is decided before; the probe shows what happens.
    plain = {**recipe.model_dump(mode="json"), "memory": "warn"}
    asked = {"recipe": plain, "root": str(root), "folder": str(folder), "offline": offline, "born": time.time()}
    on_progress("probe", 0, 1)
    try:
        with open(folder / "measured", "w+b") as measured, open(folder / "printed", "w+b") as printed:
            child = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.training.probe"],
                stdin=subprocess.PIPE,
                stdout=measured,
                stderr=printed,
                env=for_child(),
                start_new_session=True,  # Ctrl-C reaches this process, which ends the child
            )
            assert child.stdin is not None, "it has a pipe, which ends with this process"
            try:
                with suppress(BrokenPipeError):  # it ended before it read what to try
                    child.stdin.write(json.dumps(asked).encode() + b"\n")
                    child.stdin.flush()
                ended = _why(child.wait(limit_s), folder / "printed")
            except subprocess.TimeoutExpired:
                ended = f"it was not done within {limit_s:,.0f} s"
            finally:
                child.kill()
                child.wait()
                with suppress(OSError):  # unsent input
                    child.stdin.close()
            for line in (folder / "measured").read_text("utf-8").splitlines():
                found.hear(*json.loads(line))
        found.ended = found.ended or ended
        return found
    finally:
        remove(folder)
        on_progress("probe", 1, 1)


def _why(code: int, printed: Path) -> str:
    """Why the child ended, in words; empty: it came to its end."""
    lines = [line for line in printed.read_text("utf-8", "replace").splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return KILLED
    return "" if code == 0 else f"exit code {code}{': ' + lines[-1][:300] if lines else ''}"


def main() -> int:
    """The child. 0: all was measured, or it was said why not."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(Path(asked["folder"]),), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(name: str, value: Any) -> None:
        out.write(json.dumps([name, value]) + "\n")
        out.flush()

    try:
        setup = prepare(validate(asked["recipe"]), root=Path(asked["root"]), offline=asked["offline"])
        tell("starting", asdict(Timed(time.time() - asked["born"])))
        measure(setup, Path(asked["folder"]), tell=tell)
    except (TunesmithError, MemoryError, RuntimeError) as error:
        if not isinstance(error, TunesmithError) and not is_out_of_memory(error):
            raise
        is_plain = isinstance(error, TunesmithError) and not isinstance(error, OutOfMemoryError)
        tell("ended", str(error) if is_plain else f"memory ended: {error}")
    return 0


def _end_with_parent(folder: Path) -> None:
    """End this process and remove its folder when its input ends, as it does where the parent was killed."""
    while os.read(0, 1):  # sys.stdin would hold a lock that the interpreter waits for at its end
        pass
    try:
        remove(folder)
    finally:
        os._exit(1)


def measure(setup: Setup, folder: Path, *, tell: Tell) -> None:
    """Do it, and tell each piece as soon as it is done. A checkpoint and a result are written into `folder`.

    Raises what a run would: OutOfMemoryError, NonFiniteError, StorageError.
    """

    def tell_all(name: str, value: Any) -> None:
        tell(name, value)
        tell("peak", peak(setup.device))

    _take_steps(setup, tell_all)
    _measure_rows(setup, tell_all)
    _answer(setup, tell_all)
    began = time.perf_counter()
    checkpoint.save(folder, 1, weights=setup.attachment.trained, optimizer=setup.optimizer.state(), state={})
    tell_all("saving", asdict(Timed(time.perf_counter() - began)))
    began = time.perf_counter()
    setup.save_result(folder / "result")
    written = time.perf_counter() - began
    smoke_test(length_histogram(setup))  # a report without its numbers
    tell_all("finishing", asdict(Timed(written + time.perf_counter() - began)))  # the result is rehearsed, and written


def peak(device: str) -> int:
    """Most bytes that this process has held; on a card with its context."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    return peak_memory_bytes(device)


def _take_steps(setup: Setup, tell: Tell) -> None:
    """The heaviest step, and others whose tokens are nearest to the mean."""
    sampler, steps = setup.sampler, setup.total_steps
    heavy = setup.forecast.heavy if setup.forecast else heaviest(sampler, steps, setup.rows.store)
    mean = float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch
    others = [step for step in range(1, min(steps, LOOKED_AT) + 1) if step != heavy.step]
    usual = sorted(others, key=lambda step: abs(sum(setup.rows.store.lengths[sampler.rows(step)]) - mean))[:MORE]
    spent = 0.0
    for number, step in enumerate([heavy.step, *usual]):
        event = next(training_steps(setup, start=step - 1))
        if (halved := event.values.get("tokens_per_pass")) is not None:
            tell("note", f"memory ended in step {step}: its passes had to be of {halved:,} tokens")
        seconds = event.timing["seconds"]
        tell("step", asdict(Timed(seconds, event.values["tokens"], step=step)))
        spent += seconds if number else seconds / 2  # a heavy step of a minute is the only one
        if spent > USUAL_S or (number >= USUAL and spent > MORE_S):
            return


def _measure_rows(setup: Setup, tell: Tell) -> None:
    """Micro-batches of held-out rows: the one that needs the most memory, and then others."""
    collator, rows, sampler = setup.held_collator, [int(i) for i in setup.rows.held_rows], setup.sampler
    passes = micro_batches_of(collator.store, rows, tokens_per_pass=sampler.tokens_per_pass, layout=sampler.layout)
    if not passes:
        return
    targets_I, seconds, tokens = targets_of(collator.store), 0.0, 0
    heavy = max(passes, key=lambda members: float(targets_I[list(members)].sum()))
    some = [heavy, *passes[:: max(1, len(passes) // LOOKS)][:LOOKS]]
    for number, members in enumerate(some):
        began = time.perf_counter()
        predict_rows(setup.model, setup.task, collator, members, tokens_per_pass=sampler.tokens_per_pass)
        if number:
            seconds += time.perf_counter() - began
            tokens += int(collator.store.lengths[list(members)].sum())
        if seconds > LOOKS_S:
            break
    tell("measuring", asdict(Timed(seconds, tokens)))


def _answer(setup: Setup, tell: Tell) -> None:
    """Extra seconds of an answer of more tokens."""
    if not setup.samples:
        return
    prompts = [sample.ids for sample in setup.samples[:ANSWER_BATCH]]
    taken = []
    for words in (FEW_WORDS, FEW_WORDS, MORE_WORDS):  # the very first answer is slower
        began = time.perf_counter()
        generate(setup.model, setup.renderer, prompts, words)
        taken.append(time.perf_counter() - began)
    tell("answering", asdict(Timed(max(0.0, taken[2] - taken[1]), MORE_WORDS - FEW_WORDS)))


if __name__ == "__main__":
    sys.exit(main())

"""The probe: the heaviest step of a run, usual ones and a part of everything else, tried before the run in a child.

    python -m tunesmith.training.probe

is the child. It reads what to try from its standard input, one line of JSON, and writes what it measured to its
standard output, one line a piece, so that a probe which is killed loses nothing. It ends when its input ends.
"""

# I rows, P micro-batches

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.collate import Collator
from tunesmith.data.sampler import micro_batches_of
from tunesmith.environment import for_child
from tunesmith.errors import OutOfMemoryError, TunesmithError, is_out_of_memory
from tunesmith.evaluation.general import general_rows, text_batches
from tunesmith.evaluation.generate import ANSWER_BATCH, generate
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.evaluation.report import smoke_test
from tunesmith.models.machine import peak_memory_bytes
from tunesmith.models.modes import eval_mode
from tunesmith.planning.devices import CUDA_CONTEXT
from tunesmith.planning.duration import KINDS, Duration, Kind, num_tokens, seen_rows
from tunesmith.planning.forecast import Forecast, heaviest, heaviest_looked
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe, resolved
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
LONG_S = 60.0
"""A step that takes longer is the only one."""
USUAL, USUAL_S = 4, 30.0
"""Steps of usual size, and seconds after which none is added."""
MORE, MORE_S = 16, 4.0
"""Most steps of usual size where they are short, and seconds after which none is added: the first are slower."""
SETTLED = 8
"""Steps of usual size that count, the last ones."""
LOOKED_AT = 64
"""Steps among which those of usual size are looked for."""
LOOKS, LOOKS_S = 6, 4.0
"""Micro-batches of measured rows of one kind, and seconds after which none is added."""
FEW_WORDS, MORE_WORDS = 2, 10
KILLED = "the system killed it, as it does where memory ends"

T = TypeVar("T")
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that was done."""

    seconds: float
    count: float = 1
    """Repetitions; the tokens of a step."""
    step: int = 0
    """Number of the step in the run; 0: none."""
    num_bytes: int = 0


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

    def hear(self, message: dict[str, Any]) -> None:
        """Take a line of the child: the name of a field, or a kind of work, and its value."""
        for name, value in message.items():
            if name in ("steps", "notes"):
                getattr(self, name).append(Timed(**value) if name == "steps" else value)
            elif name in ("peak", "ended"):
                setattr(self, name, value)
            elif name in KINDS:
                self.work[name] = Timed(**value)

    def prices(self, mean_tokens: float) -> dict[Kind, float]:
        """Seconds of each kind of work that was tried, once. `mean_tokens`: of a step."""
        counted = self.steps[1:][-SETTLED:] or self.steps
        token = sum(one.seconds for one in counted) / sum(one.count for one in counted)
        return {**{kind: one.seconds / one.count for kind, one in self.work.items()}, "training": mean_tokens * token}

    def duration(self, forecast: Forecast | None, mean_tokens: float) -> Duration | None:
        """The whole run at the measured prices; None without a step or a forecast, which has the counts."""
        if not self.steps or forecast is None or forecast.duration is None:
            return None
        return forecast.duration.at(self.prices(mean_tokens), SPREAD if not self.ended else forecast.duration.spread)

    def values(self, forecast: Forecast | None, mean_tokens: float) -> dict[str, Any]:
        """As JSON. `memory`: the peak, 0 where it ended before a step."""
        duration = self.duration(forecast, mean_tokens)
        seconds = None if duration is None else duration.values()
        return {**asdict(self), "memory": self.peak if self.steps else 0, "seconds": seconds}


def probe(recipe: Recipe, *, root: Path, offline: bool, on_progress: OnProgress, limit_s: float = LIMIT_S) -> Found:
    """Try the heaviest moments of a run whose every "auto" is decided. Nothing of it stays below `root`.

    Never raises for what ends the child: `Found.ended` says it.
    """
    folder = temporary_folder(root, "probe")
    # Whether it fits is decided before; the probe shows what happens.
    plain = {**recipe.model_dump(mode="json"), "memory": "warn"}
    asked = {"recipe": plain, "root": str(root), "folder": str(folder), "offline": offline, "born": time.time()}
    late = threading.Event()
    try:
        with open(folder / "printed", "w+b") as printed:
            child = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.training.probe"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=for_child(),
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches this process, which ends the child
            )

            def end_late() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(limit_s, end_late)
            timer.start()
            try:
                found = _listen(child, asked, on_progress)
            finally:
                timer.cancel()
                _end(child)
            if not found.ended:
                found.ended = f"it was not done within {limit_s:,.0f} s" if late.is_set() else _why(child, printed)
            return found
    finally:
        remove(folder)


def _listen(child: subprocess.Popen[str], asked: dict[str, Any], on_progress: OnProgress) -> Found:
    found = Found()
    assert child.stdin is not None, "it has a pipe"
    assert child.stdout is not None, "it has a pipe"
    try:
        child.stdin.write(json.dumps(asked) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            message = json.loads(line)
            if "progress" in message:
                on_progress(*message["progress"])
            else:
                found.hear(message)
    except BrokenPipeError:  # it ended before it read what to do
        pass
    child.wait()
    return found


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in filter(None, (child.stdin, child.stdout)):
        try:
            pipe.close()
        except OSError:  # unsent input
            continue


def _why(child: subprocess.Popen[str], printed: IO[bytes]) -> str:
    """Why the child ended, in words; empty: it came to its end."""
    if child.returncode == -signal.SIGKILL:
        return KILLED
    printed.seek(0)
    lines = [line for line in printed.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return "" if child.returncode == 0 else f"exit code {child.returncode}{': ' + lines[-1][:300] if lines else ''}"


def main() -> int:
    """The child. 0: all was measured, or it was said why not."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def on_progress(what: str, done: int, total: int) -> None:
        tell({"progress": [what, done, total]})

    try:
        recipe = validate(asked["recipe"])
        setup = prepare(recipe, root=Path(asked["root"]), offline=asked["offline"], on_progress=on_progress)
        tell({"starting": asdict(Timed(time.time() - asked["born"])), "peak": peak(recipe.device)})
        measure(setup, Path(asked["folder"]), tell=tell, on_progress=on_progress)
    except (TunesmithError, MemoryError, RuntimeError) as error:
        if not isinstance(error, TunesmithError) and not is_out_of_memory(error):
            raise
        is_plain = isinstance(error, TunesmithError) and not isinstance(error, OutOfMemoryError)
        tell({"ended": str(error) if is_plain else f"memory ended: {error}"})
    return 0


def measure(setup: Setup, folder: Path, *, tell: Tell, on_progress: OnProgress) -> None:
    """Do it, and tell each piece as soon as it is done. A checkpoint and a result are written into `folder`.

    Raises what a run would: OutOfMemoryError, NonFiniteError, StorageError.
    """
    stages: list[Callable[[], dict[str, Any]]] = [
        lambda: _rows(setup, "held_out", setup.held_collator, setup.rows.held_rows),
        lambda: _rows(setup, "surprising", setup.collator, seen_rows(setup.recipe, setup.rows)),
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


def peak(device: str) -> int:
    """Most bytes that this process has held. On Linux its own: getrusage of a child begins with its parent's peak."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    try:
        most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    except OSError:
        most = None
    return int(most[1]) * 1024 if most else peak_memory_bytes(device)


def _take_steps(setup: Setup, tell: Tell) -> None:
    """The heaviest step, and others whose tokens are nearest to the mean."""
    sampler, steps, lengths = setup.sampler, setup.total_steps, setup.rows.store.lengths
    heavy = setup.forecast.heavy if setup.forecast else heaviest(sampler, steps, setup.rows.store)[0]
    tokens = {
        step: sum(int(lengths[i]) for rows in sampler.step(step) for i in rows)
        for step in range(1, min(steps, LOOKED_AT) + 1)
        if step != heavy.step
    }
    mean = float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch
    usual = sorted(tokens, key=lambda step: abs(tokens[step] - mean))[:MORE]
    began = time.perf_counter()
    for number, step in enumerate([heavy.step, *usual]):
        event = next(training_steps(setup, start=step - 1))
        if (halved := event.values.get("tokens_per_pass")) is not None:
            tell({"notes": f"memory ended in step {step}: its passes had to be of {halved:,} tokens"})
        timed = Timed(event.timing["seconds"], event.values["tokens"], step=step)
        tell({"steps": asdict(timed), "peak": peak(setup.device)})
        spent = time.perf_counter() - began
        if number == 0:
            began = time.perf_counter()
            if spent > LONG_S:
                return
        elif spent > USUAL_S or (number >= USUAL and spent > MORE_S):
            return


def _rows(setup: Setup, kind: Kind, collator: Collator, rows_I: NDArray[np.int64]) -> dict[str, Any]:
    """Micro-batches of rows that are measured: the one that needs the most memory, and then usual ones."""
    if not len(rows_I):
        return {}
    rows, sampler = [int(i) for i in rows_I], setup.sampler

    def look(members: Sequence[int]) -> None:
        predict_rows(setup.model, setup.task, collator, members, tokens_per_pass=sampler.tokens_per_pass)

    look(heaviest_looked(collator.store, rows, sampler))
    passes = micro_batches_of(collator.store, rows, tokens_per_pass=sampler.tokens_per_pass, layout=sampler.layout)
    return {kind: asdict(_usual(look, passes, [num_tokens(collator.store, np.asarray(members)) for members in passes]))}


def _general(setup: Setup) -> dict[str, Any]:
    if not (resolved(setup.recipe.evaluation.general) and setup.can_generate):
        return {}
    rows = general_rows(setup.renderer.tokenizer)
    batches = [batch for _, batch in text_batches(rows, layout=setup.sampler.layout, device=setup.device)]
    amounts = [(batch.num_tokens, int(batch.num_targets)) for batch in batches]
    measure = setup.task.text_measure or setup.task.measure
    with eval_mode(setup.model):
        found = _usual(lambda batch: measure(setup.model, batch).losses_N.cpu(), batches, amounts)
    return {"general": asdict(found)}


def _usual(do: Callable[[T], object], passes: Sequence[T], amounts: Sequence[tuple[int, int]]) -> Timed:
    """Some micro-batches, nearest to the mean in tokens and targets first. What is counted are their tokens."""
    amounts_P2 = np.asarray(amounts, np.float64)
    means_2 = np.maximum(1.0, amounts_P2.mean(axis=0))
    seconds = tokens = 0.0
    for p in np.argsort(np.abs(amounts_P2 / means_2 - 1).sum(axis=1), kind="stable")[:LOOKS]:
        began = time.perf_counter()
        do(passes[p])
        seconds, tokens = seconds + time.perf_counter() - began, tokens + amounts[p][0]
        if seconds > LOOKS_S:
            break
    return Timed(seconds, tokens)


def _word(setup: Setup) -> dict[str, Any]:
    """Extra seconds of an answer of more tokens."""
    if not setup.samples:
        return {}
    prompts = [sample.ids for sample in setup.samples[:ANSWER_BATCH]]
    taken = []
    for words in (FEW_WORDS, FEW_WORDS, MORE_WORDS):  # the very first answer is slower
        began = time.perf_counter()
        generate(setup.model, setup.renderer, prompts, words)
        taken.append(time.perf_counter() - began)
    return {"answering": asdict(Timed(max(0.0, taken[2] - taken[1]), MORE_WORDS - FEW_WORDS))}


def _save(setup: Setup, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    made = checkpoint.save(folder, 1, weights=setup.attachment.trained, optimizer=setup.optimizer.state(), state={})
    seconds = time.perf_counter() - began
    return {"saving": asdict(Timed(seconds, num_bytes=sum(path.stat().st_size for path in made.iterdir())))}


def _finish(setup: Setup, folder: Path) -> dict[str, Any]:
    """The result, which is rehearsed and written, and a report without its numbers."""
    began = time.perf_counter()
    setup.save_result(folder / "result")
    written = time.perf_counter() - began
    smoke_test(length_histogram(setup))
    return {"finishing": asdict(Timed(written + time.perf_counter() - began))}


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.data`: a file of many short chats encoded, opened again, planned, and gone on with at any step.

Each part runs in a process of its own, so that its memory is its own. Rows are made of numbers, or of a file's turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measured import machine, run_child
from benchmarks.rows import read_lines


def write_rows(path: Path, num: int) -> None:
    """`num` different chats of about 30 tokens."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num):
            file.write(_line(f"What is {i} plus {i % 97}?", f"{i} plus {i % 97} is {i + i % 97}."))


def mix_rows(path: Path, num: int, *, chats: str) -> None:
    """`num` different chats, each a question of a file of chats and an answer that another of its questions has.

    Each pair stands there once, and where they are too few, once more with a number behind the question, and so on.
    """
    asked: dict[str, None] = {}
    told: dict[str, None] = {}
    for line in read_lines(chats):
        *_, question, answer = (message["content"] for message in json.loads(line)["messages"])
        asked.setdefault(question)
        told.setdefault(answer)
    questions, answers = list(asked), list(told)
    # Neighbours differ in both, and each pair is met once, where the numbers have no common divisor.
    while len(answers) > 1 and math.gcd(len(questions) + 1, len(answers)) > 1:
        answers.pop()
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num):
            laps, at = divmod(i, len(questions))
            again = laps // len(answers)
            question = f"{questions[at]} ({again + 1})" if again else questions[at]
            file.write(_line(question, answers[(i + laps) % len(answers)]))


def _line(asked: str, told: str) -> str:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def encode(model: str, path: str, folder: str, num_proc: str = "1", task: str = "chat") -> None:
    """Encode the rows, or open them where they are, then plan: prints a line of JSON."""
    import numpy as np

    from tunesmith.data.dataset import build
    from tunesmith.data.sampler import StepSampler
    from tunesmith.inference.load import make_renderer
    from tunesmith.models import load
    from tunesmith.models.load import model_kind
    from tunesmith.models.resolve_model import resolve_model
    from tunesmith.recipe.load import load as load_recipe

    given = {"model": model, "task": task, "data.train": path, "data.max_tokens": 2048, "data.too_long": "error"}
    given |= {"data.num_proc": int(num_proc)}
    recipe = load_recipe(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    located = resolve_model(model, revision=None, offline=True)
    renderer = make_renderer(recipe, load.load_tokenizer(located, None), model_kind(located))
    watch = _Watch()
    begun = time.perf_counter()
    store = build(
        Path(folder), data=recipe.data, files=recipe.data.train, renderer=renderer, on_problem=lambda problem: None
    )
    seconds = time.perf_counter() - begun
    plan = StepSampler(
        rows_I=np.arange(len(store)),
        weights_I=np.ones(len(store)),
        lengths_I=store.lengths,
        rows_per_step=16,
        tokens_per_pass=2048,
        layout="packed",
        seed=0,
    )
    begun = time.perf_counter()
    plan.step(1)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    plan.step(5 * plan.steps_per_epoch // 2)  # in another epoch: its order is made anew
    told = {
        "peak": watch.peak_bytes(),
        "rows": len(store),
        "tokens": int(store.lengths.sum()),
        "seconds": seconds,
        "plan": first,
    }
    print(json.dumps({**told, "resume": time.perf_counter() - begun}))


class _Watch(threading.Thread):
    """The most memory that this process and those it began held together, as looked up five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = 0
        self._is_over = threading.Event()
        self.start()

    def run(self) -> None:
        self._look()
        while not self._is_over.wait(0.2):
            self._look()

    def peak_bytes(self) -> int:
        """Until now, and for the last time."""
        self._is_over.set()
        self.join()
        return self._peak

    def _look(self) -> None:
        me = os.getpid()
        try:
            children = Path(f"/proc/{me}/task/{me}/children").read_text("ascii").split()
            pages = [int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) for pid in (str(me), *children)]
        except (OSError, IndexError):  # one that has just ended
            return
        self._peak = max(self._peak, sum(pages) * os.sysconf("SC_PAGE_SIZE"))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a GGUF file")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--chats", help="a JSONL file whose questions and answers make the rows, instead of numbers")
    parser.add_argument("--file", help="rows as they are, instead of any that are made")
    parser.add_argument("--task", default="chat", help="of the rows in --file")
    parser.add_argument(
        "--num-proc", type=int, nargs="+", default=[1, 2], help="processes that encode, one after another"
    )
    options = parser.parse_args(words)
    made_of = options.file or f"{options.rows:,} rows"
    print(f"{machine()['processor']}, {machine()['cores']} cores; {made_of}\n")
    columns = ("", "seconds", "rows/s", "peak RSS of all processes, GiB", "first step planned, s", "another epoch's, s")
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(options.file or Path(folder, "rows.jsonl"))
        if options.file is None:
            mix_rows(rows, options.rows, chats=options.chats) if options.chats else write_rows(rows, options.rows)
        made = [(f"encoded, num_proc {num}", num) for num in options.num_proc]
        for name, num in [*made, ("opened again", options.num_proc[-1])]:
            code = "import sys; from benchmarks.data import encode; encode(*sys.argv[1:])"
            words = [
                sys.executable,
                "-c",
                code,
                options.model,
                str(rows),
                str(Path(folder, f"encoded-{num}")),
                str(num),
                options.task,
            ]
            child = run_child(words, log=Path(folder, "log"))
            if child.code:
                sys.exit(child.tail)
            told = json.loads(child.tail.splitlines()[-1])
            rate, peak = told["rows"] / told["seconds"], told["peak"] / 2**30
            times = f"{told['plan']:.2f} | {told['resume']:.2f}"
            print(f"| {name} | {told['seconds']:.1f} | {rate:,.0f} | {peak:.2f} | {times} |", flush=True)


if __name__ == "__main__":
    main()

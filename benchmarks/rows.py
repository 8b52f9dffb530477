"""Rows for `python -m benchmarks train`: a few of a file, as every contestant gets them."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.classify import UnusableError
from benchmarks.measured import ROOT, run_child


def make_rows(
    folder: Path, model: str, train: str, held_out: str, *, num: int, num_held_out: int, max_words: int | None = None
) -> None:
    """Fill `folder`: train.jsonl, eval.jsonl, and rows.json with their token ids and which of them are targets.

    Nothing is done where rows.json is there. Rows are drawn by seed 0. Those of a CSV file of texts and labels become
    questions that list all labels; documents are cut to `max_words`. Raises UnusableError.
    """
    if (folder / "rows.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path, name, number in ((train, "train", num), (held_out, "eval", num_held_out)):
        lines = [_cut(line, max_words) for line in read_lines(path)]
        if len(lines) < number:
            raise UnusableError(
                f"{path}: {len(lines)} rows, but {number} are needed. Lower --steps or --rows-per-step."
            )
        chosen = random.Random(0).sample(lines, number)
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in chosen), "utf-8")
    script = ROOT / "benchmarks" / "peers" / "render_rows.py"
    child = run_child([sys.executable, str(script), model, str(folder)], log=folder / "log")
    if child.code:
        raise UnusableError(f"{folder}: the rows cannot be rendered:\n{child.tail}")


def read_lines(path: str) -> Sequence[str]:
    """The lines of a JSONL file, or of a CSV file of texts and labels a chat each."""
    if not path.endswith(".csv"):
        return [line for line in Path(path).read_text("utf-8").split("\n") if line.strip()]
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = ", ".join(sorted({row["label"] for row in rows}))
    question = f"Which of these is it: {labels}? Answer with one of them.\n\n"
    return [
        json.dumps({
            "messages": [
                {"role": "user", "content": question + row["text"]},
                {"role": "assistant", "content": row["label"]},
            ]
        })
        for row in rows
    ]  # fmt: skip


def _cut(line: str, max_words: int | None) -> str:
    row = json.loads(line)
    if max_words is None or not isinstance(row.get("document"), str):
        return line
    return json.dumps({**row, "document": " ".join(row["document"].split()[:max_words])})

"""Measures of a run on those held-out rows that do not stand in its training files too.

python scripts/unseen_rows.py runs/support-3f2a
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from tunesmith.runs.folder import Run


def main(name: str) -> None:
    run = Run.open(name, Path("runs"))
    train = next((run.rows_path / "train").glob("*.arrow"))
    hashes = pa.ipc.open_file(pa.memory_map(str(train))).read_all().column("hash").to_numpy()
    trained_on = {f"{int(content):016x}" for content in hashes}
    for when in ("before", "after"):
        rows = [orjson.loads(line) for line in (run.evaluation_path / f"{when}.jsonl").read_bytes().splitlines()]
        unseen = [row for row in rows if row["hash"] not in trained_on]
        loss = np.sum([row["loss"] for row in unseen]) / np.sum([row["count"] for row in unseen])
        line = f"{when}: {len(unseen)} of {len(rows)} rows were never trained on: loss {loss:.4f}"
        if unseen and "correct" in unseen[0]:
            right = sum(row["correct"] for row in unseen) / sum(row["count"] for row in unseen)
            line += f", token accuracy {right:.1%}"
        print(line)


if __name__ == "__main__":
    main(sys.argv[1])

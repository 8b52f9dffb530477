"""Sums of two digits from 1 to 9: prompts, and a grader that reads the last number of an answer.

`python sums.py FOLDER` writes train.jsonl and held-out.jsonl. No two numbers are in both files, in either order.
"""

import json
import re
import sys
from itertools import combinations_with_replacement
from pathlib import Path

PAIRS = list(combinations_with_replacement(range(1, 10), 2))
HELD_OUT = set(PAIRS[2::3])


def grade(sample, item):
    """1 where the last number of the answer is the sum, else 0."""
    numbers = re.findall(r"\d+", sample["output_text"])
    return float(numbers[-1:] == [item["reference"]])


def rows(is_held_out):
    """Rows of the one file or the other, both orders of a pair next to each other."""
    for pair in PAIRS:
        if (pair in HELD_OUT) == is_held_out:
            for a, b in sorted({pair, pair[::-1]}):
                yield {"prompt": f"What is {a} + {b}?", "reference": str(a + b)}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("train", False), ("held-out", True)):
        lines = [json.dumps(row) + "\n" for row in rows(is_held_out)]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

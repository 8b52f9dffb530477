"""Write scikit-learn's handwritten digits as pictures with a table of answers: `python scripts/digits.py FOLDER`.

FOLDER/pictures has 1,797 files of 16 × 16 pixels, digits.csv the answers to 1,500 of them, digits-held-out.csv to the
others. The digits are the test set of the UCI ML repository's hand-written digits (Alpaydin & Kaynak 1998), CC BY 4.0.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 297
QUESTION = "Which digit is it?"


def main(folder: Path) -> None:
    pixels_IP, digits_I = load_digits(return_X_y=True)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels_P, digit) in enumerate(zip(pixels_IP, digits_I, strict=True)):
        grey_HW = (pixels_P.reshape(8, 8) * 15.9).astype(np.uint8)  # 0 to 16 there
        name = f"pictures/{number:04}.png"
        Image.fromarray(grey_HW.repeat(2, 0).repeat(2, 1)).save(folder / name)
        rows.append([name, QUESTION, WORDS[digit]])
    for table, some in (("digits-held-out", rows[:HELD_OUT]), ("digits", rows[HELD_OUT:])):
        with open(folder / f"{table}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image", "prompt", "completion"], *some])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

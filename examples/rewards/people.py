"""A sentence about a person to JSON with three keys: prompts, and a grader that counts what is right.

`python people.py FOLDER` writes train.jsonl and held-out.jsonl. No name and no city is in both files.
"""

import json
import re
import sys
from pathlib import Path

KEYS = ("name", "age", "city")
TASK = "Write the name, age and city in this sentence as JSON with the keys name, age and city."
SENTENCES = (
    "My name is {name}, I am {age} years old and I live in {city}.",
    "{name} from {city} has just turned {age}.",
    "At {age}, {name} moved to {city} for good.",
    "In {city} I met {name}, who is {age} years old.",
)
FIRST = ("Ada", "Alan", "Anna", "Carl", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "James", "Julia")
LAST = ("Baker", "Carter", "Cole", "Fisher", "Gray", "Hill", "King", "Long", "Moore", "Reed", "Stone")
CITIES = ("Berlin", "Boston", "Chicago", "Dublin", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna")
OTHER_FIRST = ("Laura", "Mark", "Nina", "Oscar", "Paul", "Rosa", "Simon", "Tom")
OTHER_LAST = ("Black", "Cook", "Ford", "Lane", "Parker", "Snow", "Ward")
OTHER_CITIES = ("Athens", "Cairo", "Denver", "Lima", "Munich")


def grade(sample, item):
    """A quarter for each value under its key, and one for an answer that is this JSON and nothing else."""
    text, read = sample["output_text"], sample["output_json"]
    parts = {key: float(has_pair(text, key, item[key])) for key in KEYS}
    parts["bare"] = float(isinstance(read, dict) and sorted(read) == sorted(KEYS))
    return {"reward": sum(parts.values()) / len(parts), **parts}


def has_pair(text, key, value):
    """Whether the text has this value, in quotes or not, under this key, also in JSON that does not end or with more
    words behind a comma ("Athens, Greece")."""
    return re.search(rf'"{key}"\s*:\s*"?{re.escape(str(value))}"?\s*[,}}]', text) is not None


def rows(first, last, cities, number):
    """`number` rows: names, ages, cities and sentences take turns."""
    for i in range(number):
        person = {
            "name": f"{first[i % len(first)]} {last[i % len(last)]}",
            "age": 20 + 7 * i % 60,
            "city": cities[i // len(SENTENCES) % len(cities)],
        }
        sentence = SENTENCES[i % len(SENTENCES)].format(**person)
        yield {"prompt": f"{TASK}\n\n{sentence}", "completion": json.dumps(person), **person}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": (FIRST, LAST, CITIES, 143), "held-out": (OTHER_FIRST, OTHER_LAST, OTHER_CITIES, 24)}
    for name, words in files.items():
        lines = [json.dumps(row) + "\n" for row in rows(*words)]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

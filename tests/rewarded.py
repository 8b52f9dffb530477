"""Tiny runs of task reinforce, and the graders and prompts that they learn from."""

import json
from pathlib import Path
from typing import Any

from tiny_run import tiny_recipe
from tunesmith.recipe.schema import EvaluationOptions, Recipe

DIGITS = """
def grade(sample, item):
    text = sample["output_text"]
    return sum(letter.isdigit() for letter in text) / max(1, len(text))
"""
"""A dense reward: the share of digits in an answer."""
COUNTED = """
import os

def grade(sample, item):
    return int.from_bytes(os.urandom(2), "big") / 65536
"""
"""A judge that never answers twice alike."""
QUESTIONS = ("What is the tallest mountain", "Hello there", "Yes please", "How can I help you", "In 2024 there were")


def prompts(path: Path, num: int) -> Path:
    rows = [{"prompt": f"{QUESTIONS[i % len(QUESTIONS)]} {i}?", "number": i} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rewarded(folder: Path, *, grader: str = DIGITS, rows: int = 12, arch: str = "llama", **sections: Any) -> Recipe:
    """6 steps of 3 prompts with 4 answers of at most 6 tokens each, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "grader.py"
    file.write_text(grader)
    settings: dict[str, Any] = {
        "task": "reinforce",
        "data": {"train": [str(prompts(folder / "prompts.jsonl", rows))], "held_out": 0.25},
        "reinforce": {"grader": str(file), "samples": 4, "max_new_tokens": 6, "held_out_samples": 2},
        "train": {"epochs": "auto", "max_steps": 6, "rows_per_step": 3, "tokens_per_pass": 128},
        "method": {"name": "lora", "rank": 4, "alpha": 8},
        "evaluation": {"sample_tokens": EvaluationOptions().sample_tokens},
    }
    for name, value in sections.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    return tiny_recipe(folder, arch=arch, **settings)

"""Small models made in the test really learn: a T5 to copy, an encoder a grammar."""

import json
import random
from typing import Any

import pytest

from tiny_tasks import WORDS, task_recipe, write
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train


def after(run: Run) -> dict[str, float]:
    report = json.loads(run.report_path.read_text())
    return {key: found["value"] for key, found in report["metrics"]["after"]["measures"].items()}


def recipe_for(folder: Any, task: str, kind: str, rows: list[dict], held: list[dict], **sections: Any) -> Any:
    recipe = task_recipe(folder, task, kind, **sections)
    write(folder / f"{task}.jsonl", rows)
    write(folder / f"{task}-held.jsonl", held)
    return recipe


def copies(num: int, *, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    said = [" ".join(draw.choices(WORDS, k=3)) for _ in range(num)]
    return [{"prompt": text, "completion": text} for text in said]


@pytest.mark.slow  # 560 steps; that a T5 learns in a few: tests/training/test_every_task.py
def test_a_t5_learns_to_copy_what_it_never_saw(tmp_path):
    sections = {
        "optim": {"lr": 5e-3},
        "train": {"epochs": 6, "rows_per_step": 16, "tokens_per_pass": 512},
        "evaluation": {"samples": 16, "sample_tokens": 6, "surprising": 0},
    }
    rows, held = copies(1500, seed=1), copies(16, seed=2)
    run = train(recipe_for(tmp_path, "generate", "encoder_decoder", rows, held, **sections), root=tmp_path / "runs")
    assert after(run)["token_accuracy"] > 0.95
    answers = [event.values for event in run.events() if event.kind == "answers"]
    assert answers[-1]["measures"]["exact_match"]["value"] >= 0.75
    assert answers[0]["measures"]["exact_match"]["value"] == 0


def sentences(num: int, *, seed: int) -> list[dict[str, list[str]]]:
    """Grammar: [the|a] colour? noun verb name in place. A name is a person, and with "old" before it a longer span."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num):
        person, place = draw.choice(["Ada", "Bob", "Cleo"]), draw.choice(["Rome", "Oslo", "Lima"])
        old = draw.random() < 0.5
        words = [draw.choice(["the", "a"]), draw.choice(["big", "red", "apple"]), draw.choice(["eats", "sells"])]
        words += (["old", person] if old else [person]) + ["in", place]
        tags = ["O", "O", "O", *(["B-PER", "I-PER"] if old else ["B-PER"]), "O", "B-LOC"]
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.mark.slow
def test_an_encoder_learns_a_grammar_of_tags(tmp_path):
    sections = {
        "optim": {"lr": 3e-3},
        "train": {"epochs": 12, "rows_per_step": 8, "tokens_per_pass": 512},
        "evaluation": {"surprising": 0},
    }
    rows, held = sentences(80, seed=1), sentences(20, seed=2)
    run = train(recipe_for(tmp_path, "tag", "encoder", rows, held, **sections), root=tmp_path / "runs")
    assert after(run)["span_f1"] > 0.95
    assert run.recipe().data.labels == ("B-LOC", "B-PER", "I-PER", "O")

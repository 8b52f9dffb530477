"""Reports and evaluations show rows as their file has them, whatever tokens make of the text."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_run import tiny_recipe
from tiny_tasks import rows_of, task_recipe, write
from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import Listener, train
from tunesmith.types import Event, Example, Part, Source

SAID = "I've been PRESCRIBED the   big red plum, it's fine."


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def classifier(tmp_path: Path, listener: Listener | None = None) -> Run:
    recipe = task_recipe(tmp_path, "classify", "encoder", train={"max_steps": 1})
    write(Path(recipe.data.eval[0].path), [*rows_of("classify", 7, seed=7), {"text": SAID, "label": "fruit"}])
    return train(recipe, root=tmp_path / "runs", offline=True, listener=listener)


def test_rows_of_a_report_and_of_an_evaluation_are_as_they_were_given(tmp_path: Path) -> None:
    run = classifier(tmp_path)
    path = run.recipe().data.eval[0].path
    given = [row["text"] for row in rows_of("classify", 7, seed=7)] + [SAID]
    for name in ("before", "after"):
        assert {row["text"] for row in lines_of(run.path / "evaluation" / f"{name}.jsonl")} == set(given)
    trained = {row["text"] for row in lines_of(Path(run.recipe().data.train[0].path))}
    assert {row["text"] for row in run.read_json("evaluation/surprising.json")["rows"]} <= trained
    kept: list[dict[str, Any]] = []
    evaluate_file(load_run(run, offline=True), path, keep=kept.extend)
    assert [row["text"] for row in kept] == given


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_file_that_changed_meanwhile_does_not_lend_its_text(tmp_path: Path, is_gone: bool) -> None:
    """What was held out is shown as its tokens spell it, and that is said, since the line says something else now."""
    data = tmp_path / "classify-held.jsonl"

    def on_event(event: Event) -> None:
        if event.kind == "start":
            write(data, [{"text": f"other {i}", "label": "fruit"} for i in range(8)])
            if is_gone:
                data.unlink()

    run = classifier(tmp_path, Listener(on_event=on_event))
    assert not any("other" in row["text"] for row in lines_of(run.path / "evaluation" / "after.jsonl"))
    notes = [event.values["text"] for event in run.events() if event.kind == "note"]
    assert "8 rows are shown as their tokens spell them: the data files are not here, or have changed" in notes


def test_turns_of_a_chat_have_their_roles(tmp_path: Path) -> None:
    from tunesmith.data.splits import given_text

    parts = (Part("user", "Hi  there", False), Part("assistant", "Hello", True))
    assert given_text(Example(parts, Source("x", 1), "messages")) == "user: Hi  there\nassistant: Hello"
    assert given_text(Example((Part("text", "a  b", True),), Source("x", 1), "text", plain=True)) is None
    run = train(tiny_recipe(tmp_path, train={"max_steps": 1}), root=tmp_path / "runs")
    for row in lines_of(run.path / "evaluation" / "after.jsonl"):
        assert row["text"].startswith("user: ")
        assert "\nassistant: " in row["text"]

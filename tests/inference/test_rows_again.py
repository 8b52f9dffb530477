"""A file of answers is a file of rows: it can be read, encoded and learnt from as it is, for every task."""

import json
from pathlib import Path
from typing import Any

import pytest

from inference.headed import MANY, NUMBER, ONE, TAGS, headed
from tiny_run import model_folder
from tiny_tasks import encoder_decoder_folder, rows_of, write
from tunesmith.data.examples import examples
from tunesmith.inference.load import LoadedModel, load_model
from tunesmith.inference.predict import Predictor, predict_to
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem, Row, TaskName

KINDS = ("one", "many", "number", "tags", "chat", "generate", "text", "summarize", "summarize in words")
INPUTS = {"chat": "messages", "generate": "prompt", "text": "text", "summarize": "document", "tag": "tokens"}


def speaker_for(kind: str, path: Path) -> LoadedModel:
    labels = {"one": ONE, "many": MANY, "number": NUMBER, "tags": TAGS}.get(kind)
    if labels is not None:
        return load_model(str(headed(path, labels)), offline=True)
    task: TaskName = "summarize" if kind.startswith("summarize") else kind  # type: ignore[assignment]
    made = encoder_decoder_folder(path) if kind == "summarize" else model_folder(path)
    speaker = load_model(str(made), task=task, offline=True)
    if kind == "summarize":
        speaker.model.get_output_embeddings().weight.data[:3] = 0  # else it writes control tokens: empty answers
    return speaker


def unanswered(task: str) -> list[dict[str, Any]]:
    name = INPUTS.get(task, "text")
    rows = [{name: row[name]} for row in rows_of(task, 6)]
    return [{"messages": row["messages"][:1]} for row in rows] if task == "chat" else rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_answers_is_a_file_of_rows(tmp_path: Path, kind: str) -> None:
    speaker = speaker_for(kind, tmp_path / "model")
    task = speaker.renderer.task_name
    rows, out = write(tmp_path / "rows.jsonl", unanswered(task)), tmp_path / "out.jsonl"
    predict_to(out, Predictor(speaker, max_new_tokens=5), str(rows))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    problems: list[Problem] = []
    again = [example for _, example in examples([DataFile(path=str(out))], Data(), problems.append)]
    assert [problem.code for problem in problems] in ([], ["ignored_fields"])  # source, and how sure it was
    assert len(again) == len(lines) == 6
    encoded = speaker.renderer.encode(again)
    assert all(isinstance(found, Row) for of_row in encoded for found in of_row)
    for line, example in zip(lines, again, strict=True):
        if kind == "many":
            assert example.many
            assert list(example.labels) == line["label"]
        elif kind in ("one", "number"):
            assert example.labels == (str(line["label"]),)
        elif kind == "tags":
            assert list(example.labels) == line["tags"]
        elif kind != "text":  # how a text goes on is left out: it is no part of the text
            answer = line["messages"][-1]["content"] if kind == "chat" else line.get("completion", line.get("summary"))
            assert example.parts[-1].trained
            assert example.parts[-1].text == answer

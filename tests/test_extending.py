"""A task is a file and a row of TASKS, a data format a file and a row of FORMATS: here both come from outside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_run import model_folder
from tiny_tasks import texts
from tunesmith import types
from tunesmith.data import formats
from tunesmith.data.completion import CompletionEncoder
from tunesmith.data.renderer import EncoderSettings, RowEncoder
from tunesmith.errors import RecipeError
from tunesmith.recipe.load import validate
from tunesmith.tasks import TASKS, register
from tunesmith.tasks.losses import token_losses
from tunesmith.tasks.task import Task
from tunesmith.types import Example, Part, Problem, Source


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    parts = (Part("user", record["say"] + " :", False), Part("assistant", " " + record["say"], True))
    return Example(parts if answered else parts[:1], source, "said", plain=True)


SAID = formats.Format("said", parse, fields=("say",), required=("say",), inputs=("say",))
"""A format: {"say": "..."}."""


def encoder(settings: EncoderSettings) -> RowEncoder:
    return CompletionEncoder(settings)


ECHO = Task(
    name="echo",
    doc="The same text again.",
    shapes=("said",),
    heads={"causal": "next_token"},
    losses=token_losses,
    encoder=encoder,
    record=lambda text, answer=None: {"say": text},
    raw_text=True,
    writes_answers=True,
    answer_key="echo",
    detected="rows are texts to be repeated",
    headline_metrics=("perplexity",),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(formats.FORMATS, "said", SAID)
    register(ECHO)
    yield
    types.TASK_NAMES.remove("echo")
    del TASKS["echo"], formats.SHAPES["echo"]


def rows(path: Path, num: int, seed: int) -> Path:
    path.write_text("".join(json.dumps({"say": text}) + "\n" for text in texts(num, seed=seed)), "utf-8")
    return path


def test_a_task_and_a_format_from_outside_train_report_and_answer(tmp_path: Path) -> None:
    run = tunesmith.train(
        model_folder(tmp_path / "model"),
        rows(tmp_path / "rows.jsonl", 30, 0),
        eval=rows(tmp_path / "held.jsonl", 8, 7),
        method="lora",
        optim={"lr": 1e-2},
        train={"epochs": 3, "rows_per_step": 4},
        evaluation={"samples": 2, "sample_tokens": 4, "general": False},
        device="cpu",
        threads=1,
        root=tmp_path / "runs",
    )
    assert run.recipe().task == "echo"  # detected from the rows
    metrics = run.report["metrics"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    [line] = tunesmith.predict(run, ["the red apple"], max_new_tokens=3)
    assert "echo" in line


def test_its_name_is_known_to_recipes_and_others_are_not() -> None:
    assert validate({"task": "echo"}).task == "echo"
    with pytest.raises(RecipeError, match=r"'eco' is not auto, chat, .*, did you mean echo\?"):
        validate({"task": "eco"})

"""A judge of answers before and after: win rates, both orders, length, and who may judge what."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tiny_tasks import task_recipe, write
from tunesmith.api import evaluate
from tunesmith.cli.app import app
from tunesmith.errors import DataError, InputError
from tunesmith.inference import measure
from tunesmith.inference.load import load_any, load_model
from tunesmith.inference.measure import evaluate_file, judged
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.training.trainer import train
from tunesmith.types import Example, Part, Source

LORA = {"name": "lora", "rank": 4, "alpha": 8}
SHORT: dict[str, Any] = {"method": LORA, "dropout": 0.0, "train": {"max_steps": 3}}
PROMPT = Example((Part("user", "Which fruit?", False),), Source("a", 1), "messages")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    for task in ("chat", "reward", "prefer"):
        recipe = task_recipe(folder, task, "causal", **SHORT)
        train(recipe.model_copy(update={"name": task}), root=folder / "runs")
    return folder


def run_of(root: Path, name: str) -> Any:
    (path,) = (path for path in (root / "runs").iterdir() if path.name.startswith(name))
    return load_any(str(path), root=root / "runs")


def test_a_reward_judges_the_answers_of_a_run_against_those_of_its_base(root):
    judge, file = run_of(root, "reward"), str(root / "chat-held.jsonl")
    found = evaluate_file(run_of(root, "chat"), file, samples=4, judge=judge)
    assert "4 prompts judged by" in found.notes[-1]
    base = evaluate_file(load_any(str(run_of(root, "chat").run.path), root=root, base=True), file, samples=4)
    rewards = [
        [line["reward"] for line in predict_list(Predictor(judge), [
            {"prompt": [{"role": "user", "content": one["prompt"]}],
             "completion": [{"role": "assistant", "content": one["answer"] or " "}]} for one in answers])]
        for answers in (base.samples, found.samples)
    ]  # fmt: skip
    expected = np.mean([1.0 if new > old else 0.5 if new == old else 0.0 for old, new in zip(*rewards, strict=True)])
    assert found.measures["win_rate"]["value"] == expected


def says(monkeypatch: pytest.MonkeyPatch, choose: Any) -> None:
    def answer(self: Predictor, rows: list[Example], *_: Any) -> list[dict[str, str]]:
        return [{"answer": choose(row.parts[0].text)} for row in rows]

    monkeypatch.setattr(Predictor, "__call__", answer)


def test_a_judge_that_writes_is_asked_in_both_orders(root, monkeypatch):
    judge = run_of(root, "chat")
    prompts, before, after = [PROMPT] * 3, ["Rome", "a pear", "x"], ["a plum", "Oslo", "x"]
    fruit = ("plum", "pear")

    def knows(question: str) -> str:
        first = question.partition("Answer B:")[0]
        return "A" if any(name in first for name in fruit) else "B."

    says(monkeypatch, knows)
    assert judged(judge, prompts[:2], before[:2], after[:2])[0]["win_rate"]["value"] == 0.5  # one each
    assert judged(judge, prompts[:1], before[:1], after[:1])[0]["win_rate"]["value"] == 1.0
    says(monkeypatch, lambda question: "A")  # whatever comes first
    found, note = judged(judge, prompts, before, after)
    assert found["win_rate"]["value"] == 0.5
    assert "3 ties" in note
    says(monkeypatch, lambda question: "Both are fine.")
    assert "3 ties" in judged(judge, prompts, before, after)[1]


SPELLINGS = (
    "B", "b.", "Answer B", "Option B", "(B)", "**B**", "Assistant B", "Response: B", '"B"', "_B_", "**Answer B**",
    "The better answer is B", "B is better than A.", "I prefer B.", "answer b", "B: it is right", "[[B]]",
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_verdict_is_read_however_a_judge_spells_it(root, monkeypatch, spelling):  # trap: M9
    assert_read(root, monkeypatch, spelling)


def assert_read(root: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """A judge that always prefers the plum: in both orders, whatever it writes around the letter."""
    swapped = str.maketrans("ABab", "BAba")
    other = re.sub(r"(?<![^\W_])[ABab](?![^\W_])", lambda letter: letter[0].translate(swapped), spelling)

    def knows(question: str) -> str:
        return other if "plum" in question.partition("Answer B:")[0] else spelling

    says(monkeypatch, knows)
    found, note = judged(run_of(root, "chat"), [PROMPT] * 2, ["Rome", "Oslo"], ["a plum", "old plum"])
    assert found["win_rate"]["value"] == 1.0
    assert "neither" not in note


@pytest.mark.slow
def test_reading_the_first_letter_alone_would_be_seen(root, monkeypatch):
    monkeypatch.setattr(measure, "_choice", lambda said: {"A": -1, "B": 1}.get(said.strip()[:1].upper(), 0))
    with pytest.raises(AssertionError):
        assert_read(root, monkeypatch, "Answer B")


@pytest.mark.parametrize(
    "said", ["Both A and B", "Neither A nor B.", "A good answer is B", "", "They are alike", "Banana"]
)
def test_a_verdict_for_neither_is_a_tie_and_counted(root, monkeypatch, said):
    says(monkeypatch, lambda question: said)
    found, note = judged(run_of(root, "chat"), [PROMPT] * 2, ["Rome", "Oslo"], ["a plum", "old plum"])
    assert found["win_rate"]["value"] == 0.5
    assert "100 % of its verdicts name neither A nor B and count as ties" in note


def test_prompts_alone_are_judged_and_nothing_else_is_measured(root, tmp_path):
    rows = [json.loads(line) for line in (root / "chat-held.jsonl").read_text().splitlines()]
    prompts = [{"messages": row["messages"][:1]} for row in rows]
    run, judge = run_of(root, "chat"), run_of(root, "reward")
    found = evaluate_file(run, str(write(tmp_path / "prompts.jsonl", prompts)), samples=4, judge=judge)
    assert found.measures.keys() == {"win_rate"}
    assert len(found.samples) == found.num_rows == 4
    assert "4 prompts judged by" in found.notes[-1]
    answered = evaluate_file(run, str(write(tmp_path / "rows.jsonl", rows)), samples=8, judge=judge)
    alone = evaluate(run.run, prompts, samples=8, judge=judge.run, root=root / "runs")
    assert alone["win_rate"]["value"] == answered.measures["win_rate"]["value"]


def test_chats_and_pairs_are_prompts_to_a_run_of_preferences(root):
    run, judge = run_of(root, "prefer"), run_of(root, "reward")
    found = evaluate_file(run, str(root / "chat-held.jsonl"), samples=4, judge=judge)
    pairs = evaluate_file(run, str(root / "prefer-held.jsonl"), samples=4, judge=judge)
    assert found.measures.keys() == pairs.measures.keys() == {"win_rate"}


def test_a_file_with_prompts_and_one_answer_is_refused_by_line(root, tmp_path):
    rows = [json.loads(line) for line in (root / "chat-held.jsonl").read_text().splitlines()]
    mixed = write(tmp_path / "mixed.jsonl", [*({"messages": row["messages"][:1]} for row in rows[1:]), rows[0]])
    with pytest.raises(DataError, match="7 rows cannot be answered"):
        evaluate_file(run_of(root, "chat"), str(mixed), judge=run_of(root, "reward"))


def test_who_can_neither_judge_nor_be_judged_is_refused(root, tmp_path):
    file = str(root / "chat-held.jsonl")
    judge = run_of(root, "reward")
    with pytest.raises(InputError, match="Name a run that writes"):
        evaluate_file(judge, str(root / "reward-held.jsonl"), judge=judge)
    with pytest.raises(InputError, match="Name a run that writes"):
        evaluate_file(load_model(str(root / "model-causal")), file, samples=2, judge=judge)
    with pytest.raises(InputError, match="neither gives rewards nor writes"):
        judged(replace(judge, labels=None), [PROMPT], ["a"], ["b"])
    with pytest.raises(InputError, match=r"evaluate: judge: .* with samples=0 there are none"):
        evaluate(str(root / "no-such-run"), file, samples=0, judge=judge.run, root=root / "runs")
    assert CliRunner().invoke(app, ["eval", "no-such-run", file, "--samples", "0", "--judge", "x"]).exit_code == 2
    assert json.loads((root / "reward-held.jsonl").read_text().splitlines()[0])["chosen"]

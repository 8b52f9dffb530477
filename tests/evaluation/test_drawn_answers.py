"""A report of rewards has three prompts with all their answers, before training and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import HOSTILE, fake_run, report_of
from evaluation.test_report import Page
from tunesmith.evaluation.graded_scores import graded_result
from tunesmith.evaluation.report import sections, write_report
from tunesmith.evaluation.report.drawn_answers import telling_prompts
from tunesmith.evaluation.scores import by_key
from tunesmith.runs.atomic import to_json
from tunesmith.types import JsonObject

pytestmark = pytest.mark.pages


def row(number: int, *rewards: float | None, texts: str = "an answer") -> JsonObject:
    """The result of prompt `number`, whose last answer was cut."""
    answers = [
        {"text": f"{texts} {i}", "reward": reward, "scores": {}, "ended": i < len(rewards) - 1, "tokens": 2}
        for i, reward in enumerate(rewards)
    ]
    result = graded_result(number, answers, 1.0)
    assert result is not None
    return {**result, "source": f"held.jsonl:{number}", "text": f"Prompt {number}?"}


@pytest.mark.parametrize(("num", "shown"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 4, 6])])
def test_the_lowest_the_median_and_the_highest_change_are_shown(num: int, shown: list[int]) -> None:
    before = by_key(row(number, 0.5, 0.5) for number in range(num, 0, -1))
    after = by_key(row(number, number / 10, None, number / 10) for number in range(num, 0, -1))
    prompts = telling_prompts(before, after)
    assert [prompt["source"] for prompt in prompts] == [f"held.jsonl:{number}" for number in shown]
    assert [prompt["after"]["reward"] for prompt in prompts] == [number / 10 for number in shown]
    assert all(len(prompt["after"]["answers"]) == 3 for prompt in prompts), "one without a reward too"


def test_prompts_of_one_side_and_rows_of_text_are_not_shown() -> None:
    text: Any = {"hash": "01", "source": "a:1", "text": "x", "loss": 1.0, "count": 1}
    assert telling_prompts(by_key([text]), by_key([text])) == []
    assert telling_prompts({}, by_key([row(1, 1.0)])) == []


def test_all_answers_lie_side_by_side_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "training_plots", lambda *_: [])  # which take seconds to draw
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    del facts["lengths"]
    sides = {"before": (0.0, -0.25), "after": (1.0, None, 0.5)}
    for side, rewards in sides.items():
        texts = f"{HOSTILE[0]} {side}"
        lines = [to_json(row(number, *rewards, texts=texts)) + b"\n" for number in (1, 2)]
        (run.path / "evaluation" / f"{side}.jsonl").write_bytes(b"".join(lines))
    write_report(run, facts, progress)
    assert [prompt["source"] for prompt in report_of(run)["drawn_answers"]] == ["held.jsonl:1", "held.jsonl:2"]
    html = (run.path / "report.html").read_text()
    page = Page(html)
    assert "Prompts with all answers" in page.text
    assert page.text.count("Mean reward −0.1250 → 0.7500") == 2
    for words in ("Prompt 2?", f"{HOSTILE[0]} before 1", f"{HOSTILE[0]} after 2", "−0.25 cut at the limit"):
        assert words in page.text
    assert html.count('data-name="reward after">none</td>') == 2
    assert "script" not in page.seen
    assert html.count(">before 0</bdi>") == 0
    markdown = (run.path / "report.md").read_text()
    assert markdown.count("### Mean reward −0.1250 → 0.7500") == 2
    assert markdown.count("cut at the limit") == 4
    assert markdown.count("| none |") == 2

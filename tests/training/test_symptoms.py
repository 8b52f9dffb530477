"""Notes on the commonest disappointments: each is said where it shows, with its word, and nowhere else."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from tunesmith.recipe.schema import Loss
from tunesmith.training.symptoms import symptoms
from tunesmith.types import Event


def evaluation(name: str, loss: float) -> Event:
    return Event("evaluation", 0, 0.0, {"name": name, "loss": loss}, {})


def steps(*losses: float) -> list[Event]:
    return [Event("step", i, 0.0, {"loss": loss}, {}) for i, loss in enumerate(losses, start=1)]


def answer(text: str, *, stopped: bool, reference: str = "On Monday.") -> Event:
    sample = {"name": "after", "answer": text, "stopped": stopped, "reference": reference}
    return Event("sample", 0, 0.0, sample, {})


def words(task: str, events: Sequence[Event], rows: Sequence[Any] = ()) -> list[str]:
    return re.findall(r"tunesmith explain ([a-z-]+)$", "\n".join(symptoms(task, events, rows)), re.MULTILINE)


GOOD = [evaluation("before", 2.4), *steps(*[2.0] * 8), evaluation("after", 1.9)]


def test_a_good_run_shows_none() -> None:
    assert words("chat", [*GOOD, *[answer("It left on Monday.", stopped=True)] * 5]) == []


@pytest.mark.parametrize(
    ("after", "trained", "word"),
    [
        (2.4, 2.2, "loss-does-not-fall"),
        (2.0, 0.1, "it-copies-rows"),
        (1.0, 2.0, "held-out-better-than-training"),
    ],
)
def test_losses_that_are_odd(after: float, trained: float, word: str) -> None:
    events = [evaluation("before", 2.4), *steps(*[trained] * 16), evaluation("after", after)]
    assert words("chat", events) == [word]


def test_the_loss_of_drawn_answers_is_not_compared_with_rewards() -> None:
    events = [evaluation("before", -0.2), *steps(*[0.01] * 16), evaluation("after", -0.9)]
    assert words("reinforce", events) == []


@pytest.mark.parametrize("trained", [0.1, 9.0, -0.2])
def test_a_loss_of_drawn_answers_is_not_compared_with_that_of_rows(trained: float) -> None:
    drawn = [Event("step", i, 0.0, {"loss": trained, "answer_tokens": 6.0}, {}) for i in range(1, 17)]
    assert words("distil", [evaluation("before", 2.4), *drawn, evaluation("after", 2.0)]) == []
    risen = [evaluation("before", 2.4), *drawn, evaluation("after", 2.5)]
    assert words("distil", risen) == ["loss-does-not-fall"]


def test_a_training_loss_with_additions_is_above_the_held_out_one() -> None:
    events = [evaluation("before", 2.4), *steps(*[3.4] * 16), evaluation("after", 2.0)]
    assert words("chat", events) == ["held-out-better-than-training"]
    assert list(symptoms("chat", events, [], Loss(label_smoothing=0.1))) == []


def test_a_classifier_that_gives_one_class() -> None:
    rows = [{"label": ("good", "bad")[i % 2], "predicted": "good"} for i in range(12)]
    assert words("classify", GOOD, rows) == ["one-class"]
    assert words("classify", GOOD, [*rows, {"label": "bad", "predicted": "bad"}]) == []
    assert words("classify", GOOD, rows[:4]) == []


def test_answers_that_do_not_end() -> None:
    """Those that are as long as their references are cut off by the limit alone."""
    endless = [answer("on and on and on and on", stopped=False)] * 5
    assert words("chat", [*GOOD, *endless]) == ["answers-never-end"]
    assert words("text", [*GOOD, *endless]) == []
    assert words("chat", [*GOOD, *[answer("It left on Monday.", stopped=False, reference="It is there.")] * 5]) == []


def test_a_loss_that_rose_while_more_answers_are_right_says_both() -> None:
    events = [
        Event("evaluation", 0, 0.0, {"name": name, "loss": loss, "measures": {"accuracy": {"value": right}}}, {})
        for name, loss, right in (("before", 0.9, 0.4), ("after", 1.1, 0.7))
    ]
    (note,) = symptoms("classify", events, ())
    assert "1.1000 after; more answers are right, and the wrong ones are surer: tunesmith explain" in note

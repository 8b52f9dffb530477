"""What a plan says of answers that are drawn, of graders and of teachers: the work that such a run does."""

from pathlib import Path
from typing import Any

import pytest

from rewarded import rewarded
from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.graders import schema
from tunesmith.planning.drawn import Draws, Prices, draws_of, grade_seconds, shared, step_seconds
from tunesmith.planning.memory import Load
from tunesmith.recipe.schema import Recipe
from tunesmith.training.draw import Drawing
from tunesmith.training.local_teacher import LocalTeacher
from tunesmith.training.planned_answers import prompt_lengths
from tunesmith.training.resolve import resolve_run
from tunesmith.training.taught_answers import prompt_of
from tunesmith.training.trainer import train

PRICE = Prices(word=1.0, read=10.0, read_by_others=100.0, listed=0.0, compared=1e4, grade=1e6)
REWARDED = Recipe(task="reinforce", train={"rows_per_step": 4}, devices=1, reinforce={"samples": 2, "streams": 4})


def taught(folder: Path, **distil: Any) -> Recipe:
    """6 steps of 3 rows; the teacher has the weights of another seed."""
    teacher = str(model_folder(folder / "teacher", seed=5))
    settings: dict[str, Any] = {"train": {"max_steps": 6}, "evaluation": {"surprising": 0, "samples": 0}}
    return tiny_recipe(folder, task="distil", distil={"teacher": teacher, "top": 16, **distil}, **settings)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        # 8 answers of 5 tokens, 4 at a time, 90 − 40 tokens of prompts read, 8 grades and 5 tokens each by others
        ({}, 2 * 5 * 1 + 50 * 10 + 8 * (1e6 + 5 * 100)),
        # of two updates one learns from answers that were drawn before, and are measured
        ({"updates": 2}, 2 * 5 * 1 + 50 * 10 + 0.5 * 90 * 10 + 8 * (1e6 + 5 * 100)),
        ({"kl": 0.1}, 2 * 5 * 1 + 50 * 10 + 90 * 10 + 8 * (1e6 + 5 * 100)),
    ],
)
def test_a_step_of_drawn_answers_draws_reads_and_grades_them(options, seconds):
    reinforce = REWARDED.reinforce.model_copy(update={"max_new_tokens": 5, **options})
    recipe = REWARDED.model_copy(update={"reinforce": reinforce})
    draws = draws_of(recipe)
    assert draws == Draws(8 * reinforce.updates, 4, 5, reinforce.updates)
    assert step_seconds(recipe, draws, Load(90, 40), PRICE) == pytest.approx(seconds)


def test_a_step_with_a_teacher_is_compared_and_on_policy_drawn_and_read():
    taught_rows = Recipe(task="distil", train={"rows_per_step": 4}, devices=1, distil={"teacher": "t"})
    assert draws_of(taught_rows) is None
    assert step_seconds(taught_rows, None, Load(90, 40), PRICE) == 40 * 1e4
    distil = taught_rows.distil.model_copy(update={"on_policy": True, "max_new_tokens": 10})
    drawn = taught_rows.model_copy(update={"distil": distil})
    draws = draws_of(drawn)
    assert draws == Draws(4, 4, 10, 1)
    assert step_seconds(drawn, draws, Load(90, 40), PRICE) == 10 * 1 + 50 * 10 + 90 * 100 + 40 * 1e4


def test_rows_with_answers_and_no_teacher_take_nothing_of_it():
    chat = Recipe(task="chat", train={"rows_per_step": 4}, devices=1)
    assert (draws_of(chat), step_seconds(chat, None, Load(90, 40), PRICE)) == (None, 0.0)


def test_the_prompt_of_a_group_is_computed_once():
    assert shared(Load(8 * (30 + 5), 8 * 5), 8).tokens == 30 + 8 * 5


def test_a_grade_takes_what_its_type_takes():
    code = {"type": "python", "name": "code", "source": "def grade(sample, item): return 1.0"}
    judge = {
        "type": "score_model", "name": "judge", "model": "m", "address": "http://localhost:1/v1",
        "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    }  # fmt: skip
    both = {"type": "multi", "graders": {"a": code, "b": judge}, "calculate_output": "a + b"}
    seconds = [grade_seconds(schema.from_value(grader)) for grader in (code, judge, both)]
    assert seconds[0] > 0
    assert seconds[1] == 2.0 / 8
    assert seconds[2] == seconds[0] + seconds[1]


def test_a_plan_says_the_held_out_answers_that_a_run_draws_and_grades(tmp_path, monkeypatch):
    recipe = rewarded(tmp_path, evaluation={"every": 3}, train={"max_steps": 4})
    duration = resolve_run(recipe, root=tmp_path / "runs").forecast.duration
    graded, held_out = [], Drawing.held_out

    def counted(self, *args):
        groups = held_out(self, *args)
        graded.append(sum(len(group.answers) for group in groups))
        return groups

    monkeypatch.setattr(Drawing, "held_out", counted)
    train(recipe, root=tmp_path / "runs")
    assert len(graded) == 4, "before, on the way, twice in the end: of the last step and of the best"
    assert duration.counts["grading"] == sum(graded)
    assert duration.counts["answering"] == 4 * 6, "all answers together"
    assert all(duration.prices[kind] > 0 for kind, count in duration.counts.items() if count)


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_plan_says_the_tokens_that_a_teacher_reads_before_the_steps(tmp_path, monkeypatch, on_policy):
    recipe = taught(tmp_path, on_policy=on_policy, **({"max_new_tokens": 6} if on_policy else {}))
    duration = resolve_run(recipe, root=tmp_path / "runs").forecast.duration
    read, lists = [], LocalTeacher.lists

    def counted(self, rows):
        read.append(sum(len(row.ids) for row in rows))
        return lists(self, rows)

    monkeypatch.setattr(LocalTeacher, "lists", counted)
    train(recipe, root=tmp_path / "runs")
    assert duration.counts["teaching"] == sum(read) > 0
    assert duration.prices["teaching"] > 0


def test_answers_on_policy_are_foreseen_as_long_as_they_may_be(tmp_path):
    plans = [
        resolve_run(taught(tmp_path, on_policy=True, max_new_tokens=new), root=tmp_path / "runs") for new in (6, 60)
    ]
    few, many = (plan.forecast for plan in plans)
    rows = plans[0].rows
    expected = [len(prompt_of(rows.store.row(int(i)))) + 6 for i in rows.train_rows]
    assert few.sampler.lengths_I.tolist() == expected
    assert many.duration.prices["training"] > few.duration.prices["training"]
    assert any("answers of 60 tokens each (distil.max_new_tokens)" in note for note in plans[1].notes)


def test_prompts_are_all_before_the_last_answer(tmp_path):
    data = {"train": [str(chats(tmp_path / "more.jsonl", 30, seed=3))], "held_out": 0.0}
    store = resolve_run(tiny_recipe(tmp_path, data=data), root=tmp_path / "runs").rows.store
    assert prompt_lengths(store).tolist() == [len(prompt_of(store.row(i))) for i in range(len(store))]

"""Decisions about a recipe: the last one counts, and all are checked together."""

import pytest

from tunesmith.errors import RecipeError
from tunesmith.planning.decisions import Decisions, with_options
from tunesmith.recipe.load import validate
from tunesmith.types import Choice

GIVEN = {"model": "m", "method": {"name": "lora", "rank": 4}, "data": {"train": ["a.jsonl"]}}


def test_a_later_decision_takes_the_place_of_an_earlier_one():
    decisions = Decisions(validate(GIVEN))
    decisions.decide(Choice("optim.lr", 1e-3, "usual"), Choice("threads", 1, "one core"))
    decisions.decide(Choice("optim.lr", 2e-3, "on rows"))
    decisions.set("devices", 1)
    assert [(choice.key, choice.reason) for choice in decisions.choices] == [
        ("threads", "one core"),
        ("optim.lr", "on rows"),
    ]
    folded = decisions.folded()
    assert (folded.optim.lr, folded.threads, folded.devices) == (2e-3, 1, 1)
    assert decisions.given.optim.lr == "auto"


def test_rules_see_what_is_decided_so_far():
    decisions = Decisions(validate(GIVEN))
    assert decisions.is_open("train.rows_per_step")
    decisions.set("train.rows_per_step", 8)
    assert not decisions.is_open("train.rows_per_step")
    assert decisions.recipe.train.rows_per_step == 8


def test_options_that_contradict_each_other_are_refused_together():
    decisions = Decisions(validate(GIVEN))
    decisions.set("evaluation.patience", 2)
    decisions.set("evaluation.every", 5)
    assert decisions.folded().evaluation.patience == 2  # the order of decisions does not matter
    decisions.set("evaluation.every", None)
    with pytest.raises(RecipeError, match="patience: needs evaluations on the way"):
        decisions.folded()


def test_files_and_template_keep_their_places():
    recipe = validate(GIVEN)
    recipe = recipe.model_copy(update={"data": recipe.data.with_template_at("elsewhere.jinja")})
    other = with_options(recipe, {"data.max_tokens": 64, "method.name": "qlora"})
    assert (other.data.template_at, other.data.max_tokens) == ("elsewhere.jinja", 64)
    assert (other.method.name, other.method.model_dump()["rank"]) == ("qlora", 4)

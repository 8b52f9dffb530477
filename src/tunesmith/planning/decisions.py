"""Decisions about a recipe, with their reasons: gathered one by one, folded into the recipe together.

what a person gave ─▶ decide, decide, … ─▶ folded()        rules read `recipe`, which shows what is decided so far
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Data, Recipe
from tunesmith.types import Choice


class Decisions:
    """Decisions about a recipe; a later one takes the place of an earlier one about the same option."""

    def __init__(self, given: Recipe) -> None:
        self.given = self.recipe = given  # `recipe` is replaced by every decision, unchecked
        self._reasons: dict[str, Choice] = {}

    @property
    def choices(self) -> list[Choice]:
        """Decisions that a person is shown, in order."""
        return list(self._reasons.values())

    def decide(self, *choices: Choice) -> None:
        """Set options, each for a reason that a person is shown."""
        for choice in choices:
            self.set(choice.key, choice.value)
            self.show(choice)

    def set(self, key: str, value: Any) -> None:
        """Set an option of which nothing is shown."""
        self.recipe = with_option(self.recipe, key, value)

    def show(self, choice: Choice) -> None:
        """Show a decision behind all others; its option was set before."""
        self._reasons.pop(choice.key, None)
        self._reasons[choice.key] = choice

    def is_open(self, key: str) -> bool:
        """True while an option is "auto"."""
        value = reduce(getattr, key.split("."), self.recipe)
        return bool(value == "auto" or getattr(value, "name", None) == "auto")

    def folded(self) -> Recipe:
        """The recipe with all decisions. Raises RecipeError for options that contradict each other."""
        return checked(self.recipe)


def with_option(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one option set, unchecked."""
    section, _, name = key.rpartition(".")
    changed = getattr(recipe, section).model_copy(update={name: value}) if section else value
    return recipe.model_copy(update={section or name: changed})


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with these options, checked together. Raises RecipeError."""
    return checked(reduce(lambda before, item: with_option(before, *item), options.items(), recipe))


def checked(recipe: Recipe) -> Recipe:
    """The recipe as if it were read from its own file, with its files and its model at their places."""
    made = validate(recipe.model_dump(warnings=False))  # of a method that is a mapping or a name still
    others = {key: getattr(made.data, key) for key in Data.model_fields.keys() - {"train", "eval", "replay"}}
    made = made.model_copy(update={"data": recipe.data.model_copy(update=others)})
    return made if recipe.base is None else made.on_base(recipe.base)

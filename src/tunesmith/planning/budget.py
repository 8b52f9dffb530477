"""The amount that a run measures if the recipe leaves it open: at most about a third of the run, however short it is.

What is counted are tokens, so that the same command decides the same on a machine that is slow today.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.evaluation.general import ANSWER_TOKENS
from tunesmith.evaluation.generate import ANSWER_BATCH
from tunesmith.planning.defaults import operations_per_second, with_choice
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import Choice

HELD = 1000
"""Most held-out rows measured in it."""
FEW_HELD = 50
"""Held-out rows that are measured in every run: fewer tell nothing."""
FEW_PROMPTS = 4
"""Prompts that are answered at least, if any are."""
TRAINED = 3.0
"""Cost of a trained token, in tokens that are only read: SmolLM2 in LoRA 3.4 times as much, by its forecast."""
SHARE = 1 / 3
"""Largest share of a run that measuring takes."""
WORD = 80
"""Cost of the next word of some answers, in tokens that are read together, since every weight comes from memory for
it: 86 by the forecast of SmolLM2 on two cores; more on a card."""
GENERAL_TOKENS = 5400
"""Tokens of the general text, by the tokenizer of SmolLM2."""
UNNOTICED_S = 10.0
"""Seconds of measuring in every run: as long as its start takes."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """Inputs of the decision."""

    num_parameters: int
    device: str
    trained: float
    """Tokens of all steps."""
    row: float
    """Mean tokens of a training row."""
    held: int
    """Tokens of the held-out rows that would be measured."""
    held_rows: int
    prompts: int
    """Held-out prompts that there are to be answered; 0: such a model does not answer."""
    answer_tokens: int
    """Most new tokens of such an answer."""
    speaks: bool
    """Whether general ability is measured of such a model."""


def decide_measuring(recipe: Recipe, given: Recipe, size: RunSize) -> tuple[Recipe, list[Choice]]:
    """The recipe without "auto" in `evaluation`, and what was made less than in a longer run.

    `given`: the recipe as a person wrote it: what it does not leave to "auto" stays.
    """
    was, evaluation = given.evaluation, recipe.evaluation
    unnoticed = UNNOTICED_S * operations_per_second(size.device) / (2 * size.num_parameters)
    budget = max(TRAINED * size.trained * SHARE / (1 - SHARE), unnoticed)

    def answering(samples: int) -> float:
        return 2.0 * WORD * math.ceil(min(samples, size.prompts) / ANSWER_BATCH) * size.answer_tokens

    found: dict[str, tuple[int | bool, int | bool]] = {}  # name → what is chosen, what a longer run has

    rows = HELD if was.max_rows == "auto" else was.max_rows
    left = budget - 2 * size.held
    if was.max_rows == "auto":
        if left < 0 and was.every is None and size.held_rows > FEW_HELD:
            rows = max(FEW_HELD, math.floor(size.held_rows * budget / (2 * size.held)))
            left = 0.0
        found["max_rows"] = (rows or HELD, HELD)

    samples = most = resolved(evaluation.samples)
    if was.samples == "auto":
        while samples and answering(samples) > max(0.0, left):
            samples = samples // 2 if samples // 2 >= FEW_PROMPTS else 0
        found["samples"] = (samples, most)
    left -= answering(samples)

    general = was.general
    cost = 2.0 * (GENERAL_TOKENS + WORD * ANSWER_TOKENS) if size.speaks else 0.0
    if general == "auto":
        general = cost <= left
        found["general"] = (general, True)
    left -= cost if general else 0.0

    if was.surprising == "auto":
        most = resolved(evaluation.surprising)
        found["surprising"] = (min(most, max(0, math.floor(left / size.row))), most)

    choices = []
    for name, (value, longer) in found.items():
        reason = f"the run is short, and measuring takes at most about a third of it; {_text(longer)} in a longer one"
        choice = Choice(f"evaluation.{name}", value, reason)
        recipe = with_choice(recipe, choice)
        choices += [choice] if value != longer else []
    return recipe, choices


def _text(value: int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}"

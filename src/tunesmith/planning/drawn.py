"""The work of answers that a run draws, and of other models that read: a grader's, a teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from tunesmith.graders import schema
from tunesmith.graders.pool import IN_CHILDREN, JUDGED_AT_ONCE
from tunesmith.planning.devices import Device
from tunesmith.planning.memory import Load, Sizes
from tunesmith.recipe.distillation import STREAMS
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS

CODE_S, TESTS_S, JUDGE_S = 2e-3, 0.2, 2.0
"""Seconds of a grade by code in a process that runs, by tests in new ones, and of a judge's reply, until a
grader is tried."""
DIVERGENCE_MOVED, LIST_MOVED = 16, 8
"""Times that the logits of a target are read or written in float32 where they are compared with a teacher's,
and where the likeliest of them are listed."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Answers that one device draws at once, again and again in a run."""

    answers: int
    """Answers of a draw."""
    streams: int
    """Most that are decoded together."""
    new_tokens: int
    """Most tokens of an answer."""
    steps: int
    """Steps that learn from a draw."""

    def words(self, answers: int | None = None) -> int:
        """Tokens that are written one after the other for this number of answers of full length; None: a
        draw's."""
        num = self.answers if answers is None else answers
        return self.new_tokens * -(-num // self.streams)


def draws_of(recipe: Recipe) -> Draws | None:
    """The draws of a run; None: its rows have answers."""
    rows = -(-resolved(recipe.train.rows_per_step) // resolved(recipe.devices))
    if TASKS[resolved(recipe.task)].samples:
        options = recipe.reinforce
        answers = rows * options.updates * options.samples
        return Draws(answers, resolved(options.streams), options.max_new_tokens, options.updates)
    if recipe.distil.on_policy:
        return Draws(rows, min(rows, STREAMS), recipe.distil.max_new_tokens, 1)
    return None


def grade_seconds(grader: Any) -> float:
    """Seconds that a grade takes of a run, by the types of the grader; the reading of a reward run is apart."""
    each: dict[type[Any], float] = dict.fromkeys(get_args(IN_CHILDREN), CODE_S)
    each |= {schema.UnitTests: TESTS_S, schema.ScoreModel: JUDGE_S / JUDGED_AT_ONCE}
    return sum(each.get(type(part), 0.0) for part in schema.parts_of(grader).values())


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of one piece of each kind of this work."""

    word: float
    """The next token of the answers that are decoded together."""
    read: float
    """A token that the model reads."""
    read_by_others: float
    """A token that a teacher, or the reward runs of a grader, read."""
    listed: float
    """A token of which a teacher's likeliest next ones are listed, its reading included."""
    compared: float
    """A target whose probabilities are compared with a teacher's."""
    grade: float
    """An answer that is graded, without what a reward run reads."""

    @classmethod
    def of(cls, sizes: Sizes, device: Device, *, word: float, read: float, others: int, grade: float) -> Prices:
        """`others`: bytes of other models' weights, whose tokens cost as the model's do, by their weights."""
        met = sizes.linear_weights + sizes.hidden * sizes.outputs
        by_others = read * others / sizes.itemsize / max(1, met)
        moved = 4 * sizes.outputs / device.bandwidth
        return cls(word, read, by_others, by_others + LIST_MOVED * moved, DIVERGENCE_MOVED * moved, grade)


def step_seconds(recipe: Recipe, draws: Draws | None, load: Load, price: Prices) -> float:
    """Seconds of a mean step for answers, their grades and what a teacher reads, besides learning `load`."""
    task = TASKS[resolved(recipe.task)]
    compared = load.targets * price.compared if recipe.distil.teacher is not None else 0.0
    if draws is None:
        return compared
    drawn = draws.words() / draws.steps * price.word + (load.tokens - load.targets) * price.read
    if not task.samples:  # the teacher's output layer is computed with the model's
        return drawn + load.tokens * price.read_by_others + compared
    # Answers of later steps are measured when they are drawn; a divergence needs the untouched model.
    measured = (1 - 1 / draws.steps + (recipe.reinforce.kl > 0)) * load.tokens * price.read
    rows = draws.answers / draws.steps * resolved(recipe.devices)  # the first device grades for all
    mean = load.targets / (draws.answers / draws.steps)
    return drawn + measured + rows * (price.grade + mean * price.read_by_others)


def shared(load: Load, samples: int) -> Load:
    """The load of a step of drawn answers where the prompt of each group is computed once."""
    return replace(load, tokens=round(load.targets + (load.tokens - load.targets) / samples))

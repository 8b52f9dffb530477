"""Draw the rows that a step of task distil learns on policy: the model answers each prompt, the teacher reads
it.

An answer is a function of the weights, the seed, the step and the row; the teacher's numbers are a function of
the answer. So a resumed run equals one that never stopped.
"""

# N trained tokens of an answer, C numbers of each

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tunesmith.data.answers import AnswerStore, DrawnSource, answer_row
from tunesmith.data.dataset import RowStore
from tunesmith.data.renderer import Renderer
from tunesmith.errors import RecipeError
from tunesmith.generation.draws import Draw, DrawnAnswer, refuse_undrawable
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.parallel.world import World
from tunesmith.recipe.distillation import STREAMS, Distil
from tunesmith.recipe.schema import resolved
from tunesmith.tasks.distil import DISTIL
from tunesmith.training.draw import over_answers, seeds_of, values_of_answers
from tunesmith.training.groups import draw_together
from tunesmith.training.local_teacher import teacher_here
from tunesmith.training.resolve import ResolvedRun
from tunesmith.training.state import Drawn, TrainState
from tunesmith.training.teacher import Teacher
from tunesmith.types import Row


@dataclass
class Distilling:
    """`TrainState.draw` of a run that learns a teacher's probabilities at the tokens of its own answers."""

    options: Distil
    seed: int
    renderer: Renderer
    teacher: Teacher
    output: OutputLayer | None
    """The output layer of the model, as its losses take it."""

    def __call__(self, state: TrainState, step: int) -> Drawn:
        """The answers that a step learns, with what the teacher says of each token. Each rank draws some of
        them, and has the teacher read those that it learns. Raises TeacherError."""
        rows, began = list(state.sampler.rows(step)), time.perf_counter()
        answers = self._answers(state, rows, step)
        drawn_s = time.perf_counter() - began
        learnt = [_row(state.store, row, answer) for row, answer in zip(rows, answers, strict=True)]
        store = AnswerStore(learnt, divisor=float(sum(len(answer.ids) for answer in answers)))
        view = over_answers(state, store, shares=False)
        mine = sorted(row for members in view.sampler.step(1) for row in members)
        values, loss_sum = self.teacher.taught([store.rows[i] for i in mine], [answers[i] for i in mine], self.output)
        for i, values_NC in zip(mine, values, strict=True):
            store.rows[i] = replace(store.rows[i], values_NC=values_NC)
        view = replace(view, task=replace(state.task, loss_sum=loss_sum))
        timing = {"draw": drawn_s, "teacher": time.perf_counter() - began - drawn_s}
        return Drawn(view, rows, lambda: values_of_answers(answers), timing)

    def _answers(self, state: TrainState, rows: Sequence[int], step: int) -> list[DrawnAnswer]:
        most, temperature = self.options.max_new_tokens, self.options.temperature
        settings = Draw(renderer=self.renderer, num=1, temperature=temperature, max_new_tokens=most, streams=STREAMS)
        seeds = seeds_of(state.store, rows, seed=self.seed, step=step)
        prompts = [prompt_of(state.store.row(row)).tolist() for row in rows]
        return [answer for (answer,) in draw_together(state, prompts, seeds, settings)]


def taught_by(
    plan: ResolvedRun, model: PreTrainedModel, output: OutputLayer | None, world: World
) -> tuple[Teacher | None, Distilling | None]:
    """The teacher of a resolved run, and what draws answers by it, where it has these.

    Raises ModelError for a model whose answers cannot be drawn, and what `teacher_here` does.
    """
    recipe, inputs = plan.recipe, plan.inputs
    if resolved(recipe.task) != DISTIL.name:
        return None, None
    if plan.rows.has_images:
        raise RecipeError(
            "task: distil: rows have images, which teachers do not read yet. Use task chat, or other rows."
        )
    if recipe.distil.on_policy:
        refuse_undrawable(inputs.located.name, model)
    teacher = plan.served or teacher_here(plan, world)
    if not recipe.distil.on_policy:
        return teacher, None
    return teacher, Distilling(recipe.distil, recipe.seed, inputs.renderer, teacher, output)


def prompt_of(row: Row) -> NDArray[np.int32]:
    """The ids before the last answer of a row: the prompt as serving would feed it."""
    untrained = np.flatnonzero(~row.trained[: np.flatnonzero(row.trained)[-1]])
    return row.ids[: int(untrained[-1]) + 1]


def _row(store: RowStore, row: int, answer: DrawnAnswer) -> Row:
    source = store.source(row)
    return answer_row(prompt_of(store.row(row)), answer.ids, DrawnSource(source.path, source.line))

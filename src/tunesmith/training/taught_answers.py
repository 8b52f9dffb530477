"""Draws what a step of task distil learns on policy: an answer to each prompt by the
model itself, read by the teacher.

An answer follows from the weights, the seed, the step and the row, and what the teacher finds from the answer:
a run that goes on is one that never stopped.
"""

# N trained tokens of an answer, D hidden size of the teacher

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tunesmith.data.answers import AnswerStore, DrawnSource, answer_row
from tunesmith.data.dataset import RowStore
from tunesmith.data.renderer import Renderer
from tunesmith.errors import RecipeError
from tunesmith.generation.draws import Draw, DrawnAnswer, draw_answers, drawing, refuse_undrawable
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.recipe.distillation import STREAMS
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks.distil import DISTIL
from tunesmith.tasks.distil_losses import reverse_loss_sum
from tunesmith.training.draw import over_answers, seeds_of, values_of_answers
from tunesmith.training.resolve import ResolvedRun
from tunesmith.training.state import Drawn, TrainState
from tunesmith.training.teacher import Teacher, load_teacher
from tunesmith.types import Row, required


@dataclass
class Distilling:
    """`TrainState.draw` of a run that learns from its own answers as a teacher would go on."""

    recipe: Recipe
    renderer: Renderer
    teacher: Teacher
    output: OutputLayer | None
    """The output layer of the model, as its losses take it."""

    def __call__(self, state: TrainState, step: int) -> Drawn:
        """The answers that a step learns, with what the teacher's output layer reads at each token."""
        rows, began = list(state.sampler.rows(step)), time.perf_counter()
        answers = self._answers(state, rows, step)
        drawn_s = time.perf_counter() - began
        learnt = [_row(state.store, row, answer) for row, answer in zip(rows, answers, strict=True)]
        hidden = self.teacher.hidden(learnt)
        taught = [replace(row, values_NC=hidden_ND) for row, hidden_ND in zip(learnt, hidden, strict=True)]
        store = AnswerStore(taught, float(sum(len(answer.ids) for answer in answers)))
        timing = {"draw": drawn_s, "teacher": time.perf_counter() - began - drawn_s}
        return Drawn(self._view(state, store), rows, lambda: values_of_answers(answers), timing)

    def _answers(self, state: TrainState, rows: Sequence[int], step: int) -> list[DrawnAnswer]:
        options = self.recipe.distil
        most, temperature = options.max_new_tokens, options.temperature
        settings = Draw.of(self.renderer, num=1, temperature=temperature, max_new_tokens=most, streams=STREAMS)
        seeds = seeds_of(state.store, rows, seed=self.recipe.seed, step=step)
        prompts = [prompt_of(state.store.row(row)).tolist() for row in rows]
        with drawing(cast(Any, state.model)) as decoder:
            return [answer for (answer,) in draw_answers(decoder, prompts, seeds, settings)]

    def _view(self, state: TrainState, store: AnswerStore) -> TrainState:
        """The state with these answers as its rows, which it learns by the reverse divergence."""
        loss_sum = partial(
            reverse_loss_sum,
            options=self.recipe.distil,
            vocabulary=self.teacher.vocabulary,
            teacher=required(self.teacher.output),
            output=self.output,
        )
        return replace(over_answers(state, store, shares=False), task=replace(state.task, loss_sum=loss_sum))


def taught_by(
    plan: ResolvedRun, model: PreTrainedModel, output: OutputLayer | None
) -> tuple[Teacher | None, Distilling | None]:
    """The teacher of a resolved run, and what draws answers by it, where it has these.

    Raises ModelError for a model whose answers cannot be drawn, and what `load_teacher` does.
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
    teacher = load_teacher(
        recipe.distil,
        recipe.teacher_at,
        inputs.renderer.tokenizer,
        device=resolved(recipe.device),
        root=plan.root,
        offline=plan.offline,
    )
    return teacher, Distilling(recipe, inputs.renderer, teacher, output) if recipe.distil.on_policy else None


def prompt_of(row: Row) -> NDArray[np.int32]:
    """The ids before the last answer of a row, as serving feeds them."""
    untrained = np.flatnonzero(~row.trained[: np.flatnonzero(row.trained)[-1]])
    return row.ids[: int(untrained[-1]) + 1]


def _row(store: RowStore, row: int, answer: DrawnAnswer) -> Row:
    place, no_values_NC = store.source(row), np.zeros((len(answer.ids), 0), np.float32)
    source = DrawnSource(place.path, place.line)
    return answer_row(prompt_of(store.row(row)), answer.ids, no_values_NC, source)

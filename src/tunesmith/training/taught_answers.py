"""Draw the rows that a step of task distil learns on policy: the model answers each prompt, the teacher reads
it.

A teacher on this machine gives its logits at each token. One at an address gives log π_T of the drawn token,
which μ drew, and the token's advantage is log π_T − log μ, without discount and without baseline.
Its mean over drawn tokens has the gradient of the reverse divergence, and the loss of a step is an estimate of
it: Lu and Thinking Machines Lab 2025, "On-Policy Distillation".

An answer is a function of the weights, the seed, the step and the row; the teacher's numbers are a function of
the answer. So a resumed run equals one that never stopped.
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
from tunesmith.parallel.world import World
from tunesmith.recipe.distillation import STREAMS
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks.distil import DISTIL
from tunesmith.tasks.distil_losses import reverse_loss_sum
from tunesmith.tasks.policy_losses import policy_loss_sum
from tunesmith.training.draw import numbers_of, over_answers, seeds_of, values_of_answers
from tunesmith.training.groups import all_answers
from tunesmith.training.resolve import ResolvedRun
from tunesmith.training.served_teacher import ServedTeacher
from tunesmith.training.state import Drawn, TrainState
from tunesmith.training.teacher import AnyTeacher, Teacher, leader_of, load_teacher
from tunesmith.types import LossSum, Row, required

BY_TOKENS = Reinforce()
"""The loss `clip` of task reinforce at temperature 1, with its correction of rounding: one update a draw."""


@dataclass
class Distilling:
    """`TrainState.draw` of a run that learns a teacher's probabilities at the tokens of its own answers."""

    recipe: Recipe
    renderer: Renderer
    teacher: AnyTeacher
    output: OutputLayer | None
    """The output layer of the model, as its losses take it."""

    def __call__(self, state: TrainState, step: int) -> Drawn:
        """The answers that a step learns, with what the teacher says of each token. Each rank draws some of
        them, and asks the teacher of those that it learns. Raises TeacherError."""
        rows, began = list(state.sampler.rows(step)), time.perf_counter()
        answers = self._answers(state, rows, step)
        drawn_s = time.perf_counter() - began
        learnt = [_row(state.store, row, answer) for row, answer in zip(rows, answers, strict=True)]
        divisor = float(sum(len(answer.ids) for answer in answers))
        passes = over_answers(state, AnswerStore(learnt, divisor), shares=False).sampler.step(1)
        mine = sorted(row for members in passes for row in members)
        values, loss_sum = self._taught([learnt[i] for i in mine], [answers[i] for i in mine])
        for i, values_NC in zip(mine, values, strict=True):
            learnt[i] = replace(learnt[i], values_NC=values_NC)
        timing = {"draw": drawn_s, "teacher": time.perf_counter() - began - drawn_s}
        view = over_answers(state, AnswerStore(learnt, divisor), shares=False)
        view = replace(view, task=replace(state.task, loss_sum=loss_sum))
        return Drawn(view, rows, lambda: values_of_answers(answers), timing)

    def _answers(self, state: TrainState, rows: Sequence[int], step: int) -> list[DrawnAnswer]:
        options = self.recipe.distil
        most, temperature = options.max_new_tokens, options.temperature
        settings = Draw.of(self.renderer, num=1, temperature=temperature, max_new_tokens=most, streams=STREAMS)
        seeds, world = seeds_of(state.store, rows, seed=self.recipe.seed, step=step), state.world
        prompts = [prompt_of(state.store.row(row)).tolist() for row in rows]
        share = slice(world.rank, None, world.size)
        with drawing(cast(Any, state.model)) as decoder:
            drawn = draw_answers(decoder, prompts[share], seeds[share], settings)
        return [answer for (answer,) in all_answers(world, drawn, len(rows))]

    def _taught(self, rows: Sequence[Row], answers: Sequence[DrawnAnswer]) -> tuple[list[NDArray[np.float32]], LossSum]:
        """[N, C] of each answer by the teacher, and the loss that reads it."""
        if isinstance(self.teacher, ServedTeacher):
            logps = self.teacher.logps(rows)
            pairs = zip(answers, logps, strict=True)
            values = [numbers_of(answer, logp_N - np.array(answer.logps, np.float32)) for answer, logp_N in pairs]
            return values, partial(policy_loss_sum, options=BY_TOKENS, output=self.output)
        loss_sum = partial(
            reverse_loss_sum,
            options=self.recipe.distil,
            vocabulary=self.teacher.vocabulary,
            teacher=required(self.teacher.output),
            output=self.output,
        )
        return self.teacher.hidden(rows), loss_sum


def taught_by(
    plan: ResolvedRun, model: PreTrainedModel, output: OutputLayer | None, world: World
) -> tuple[AnyTeacher | None, Distilling | None]:
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
    teacher = plan.served or _teacher_here(plan, world)
    return teacher, Distilling(recipe, inputs.renderer, teacher, output) if recipe.distil.on_policy else None


def _teacher_here(plan: ResolvedRun, world: World) -> Teacher:
    """The teacher on this machine. Off policy the first rank of a machine alone loads it, and the others know
    whose lists they read."""
    recipe, tokenizer, leader = plan.recipe, plan.inputs.renderer.tokenizer, leader_of(world)
    if not recipe.distil.on_policy and world.rank != leader:
        identity, device = world.wait_for(f"teacher of {leader}", leader)
        return Teacher(None, recipe.distil, len(tokenizer), None, identity, device)
    teacher = load_teacher(
        recipe.distil,
        recipe.teacher_at,
        tokenizer,
        device=world.card or resolved(recipe.device),
        root=plan.root,
        offline=plan.offline,
    )
    if world.rank == leader:
        world.publish(f"teacher of {leader}", [teacher.identity, teacher.device])
    return teacher


def prompt_of(row: Row) -> NDArray[np.int32]:
    """The ids before the last answer of a row: the prompt as serving would feed it."""
    untrained = np.flatnonzero(~row.trained[: np.flatnonzero(row.trained)[-1]])
    return row.ids[: int(untrained[-1]) + 1]


def _row(store: RowStore, row: int, answer: DrawnAnswer) -> Row:
    place, no_values_NC = store.source(row), np.zeros((len(answer.ids), 0), np.float32)
    source = DrawnSource(place.path, place.line)
    return answer_row(prompt_of(store.row(row)), answer.ids, no_values_NC, source)

"""Draw the rows that a step of task reinforce learns: answers to its prompts, their grades and advantages.

A draw is a function of the weights, the seed, the step, the prompts and the grades. Grades are kept by the
digest of everything that they depend on, so a resumed run gets the grades that it got before, even from a judge
that answers differently today.
"""

# N trained tokens of an answer, C numbers of each

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.answers import AnswerStore, DrawnSource, answer_row
from tunesmith.data.dataset import RowStore
from tunesmith.data.prompts import begun_answer
from tunesmith.data.renderer import Renderer
from tunesmith.data.sampler import StepSampler, sort_keys
from tunesmith.errors import RunError, UngradedError
from tunesmith.evaluation.graded_scores import mean_scores
from tunesmith.generation.draws import Draw, DrawnAnswer
from tunesmith.graders.grade import FAILURES, Answer, Grade
from tunesmith.graders.kept import KeptGrades
from tunesmith.graders.pool import Pool
from tunesmith.parallel.world import World
from tunesmith.phrases import plural
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.atomic import storing, to_json, write_atomic
from tunesmith.tasks.policy_losses import STATS, VALUE_COLUMNS, Seen, log_probs, policy_loss_sum
from tunesmith.tasks.reinforce import advantages, divisor, has_spread
from tunesmith.training.draw_notes import DrawNotes
from tunesmith.training.groups import DrawnStep, Group, all_rows, draw_together, first_grades
from tunesmith.training.state import Drawn, TrainState
from tunesmith.types import REWARD_KEY, Example, JsonObject, Record, Row

SEEDS = 2**64 - 7
"""Purpose of the random numbers that draw answers, see `sampler.sort_keys`."""
HELD_OUT = 0
"""The step by whose random numbers held-out prompts are answered, before training and after."""
LEAST_GRADED = 0.5
"""Share of a step's answers that need a reward; with fewer the step is not learnt."""


class CountedAnswer(NamedTuple):
    """An answer whose reward counts."""

    group: Group
    number: int
    """The index of the answer in its group."""
    advantage: float

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""
        return len(self.group.answers[self.number].ids)


@dataclass
class Drawing:
    """`TrainState.draw` of a run, and its answers to held-out prompts."""

    recipe: Recipe
    renderer: Renderer
    output: Any
    """The output layer of the model, as its losses take it."""
    shares: bool
    """Whether the prompt of a group is computed once."""
    prompts: Mapping[RowStore, Mapping[int, Example]]
    """Prompt and item of every row that is trained on or measured."""
    pool: Pool
    kept: KeptGrades
    tick: Callable[[str, int, int], None] = lambda what, done, total: None
    notes: DrawNotes = field(default_factory=DrawNotes)
    folder: Path | None = None
    """Folder in which answers are kept; None: they are not."""
    _ahead: dict[int, DrawnStep] = field(default_factory=dict)
    """Answers to the prompts of steps that were not made yet."""

    def __post_init__(self) -> None:
        weakref.finalize(self, self.pool.close)  # of a run that is prepared and not taken

    @property
    def options(self) -> Reinforce:
        return self.recipe.reinforce

    def close(self) -> None:
        """End the processes of the grader, and let go of the receiver of notes."""
        self.pool.close()
        self.notes = DrawNotes()

    def __call__(self, state: TrainState, step: int) -> Drawn:
        """The answers that a step learns. Raises UngradedError where the grader
        fails for more than half of them."""
        if step not in self._ahead:
            self._draw(state, step)
        drawn = self._ahead[step]
        # A step that fails is made again after a resume: answers that cannot be drawn again then are kept.
        gone = step if self._late(step) == 0 else step - 1
        self._ahead = {at: later for at, later in self._ahead.items() if at > gone}
        self.kept.flush()
        self._write(drawn.groups, state.store, step)
        self.notes.of_step(drawn.groups, step, teaches=bool(self.options.kl))
        view, seen = self.view(state, drawn.groups, drawn.old), dict[int, Tensor]()
        loss_sum = state.task.loss_sum
        if isinstance(loss_sum, partial) and loss_sum.func is policy_loss_sum:  # and no other that a caller gave
            loss_sum = partial(loss_sum, seen=seen)
        view = replace(view, task=replace(view.task, loss_sum=loss_sum))
        of_answers = _values_of(drawn.groups)

        def values() -> JsonObject:
            return {**of_answers, **_values_of_tokens(state.world, seen, self.options)}

        return Drawn(view, [group.row for group in drawn.groups], values, drawn.timing, drawn.earlier_s)

    def _draw(self, state: TrainState, step: int) -> None:
        """Draw for a step and for the later steps that learn from the same draw. Nothing is kept if too few
        answers have a reward."""
        if late := self._late(step):
            raise RunError(
                f"step {step}: learns from answers that are drawn before step {step - late} (reinforce.updates: "
                f"{self.options.updates}), and these are not here. Start at step {step - late}, or resume the run."
            )
        steps = range(step, min(step + self.options.updates - 1, state.total_steps) + 1)
        groups, timing = self.groups_of(state, steps)
        for at, of_step in zip(steps, groups, strict=True):
            self._refuse_ungraded(of_step, at, state.store)
        began, later = time.perf_counter(), dict[int, DrawnStep]()
        for at, of_step in zip(steps[1:], groups[1:], strict=True):
            later[at] = DrawnStep(of_step, self.measured(self._learnt(state, of_step)))
        if later:
            timing["measure"] = time.perf_counter() - began
        self._ahead |= {step: DrawnStep(groups[0], (), timing), **later}

    def _late(self, step: int) -> int:
        """Updates between the draw of a step's answers and the step."""
        return (step - 1) % self.options.updates

    def pending(self, step: int) -> JsonObject:
        """Answers for later steps, drawn by weights that no longer exist: {step: values}, for a checkpoint."""
        ahead = self._ahead if self._late(step + 1) else {}
        return {str(at): drawn.values() for at, drawn in ahead.items() if at > step}

    def take(self, pending: JsonObject) -> None:
        """Take the answers that a checkpoint got from `pending`."""
        self._ahead = {int(at): DrawnStep.of(values) for at, values in pending.items()}

    def keep_in(self, folder: Path) -> list[str]:
        """Keep grades and answers in the folder of a run, and take the grades that are there. Returns
        notes on those that cannot be read, and on the grader."""
        self.folder, file = folder / "rollouts", folder / "grades.jsonl"
        if not (damaged := self.kept.keep_in(file)):
            return self.pool.notes
        what = f"{plural(len(damaged), 'line')} cannot be read, the first is line {damaged[0]:,}"
        return [*self.pool.notes, f"{file}: {what}: the grades are made again, and a judge may give others"]

    def _write(self, groups: Sequence[Group], store: RowStore, step: int) -> None:
        most = self.options.keep_answers
        if self.folder is None or most == 0:
            return
        advantage_of = {(id(group), i): advantage for group, i, advantage in self._counted(groups)}
        lines = [
            {
                "source": str(store.source(group.row)),
                "sample": i + 1,
                **record,
                "advantage": advantage_of.get((id(group), i)),
                "error": group.grades[i].error,
            }
            for group in groups
            for i, record in enumerate(group.records())
        ]
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)
            if most is not None:
                (self.folder / f"step-{step - most}.jsonl").unlink(missing_ok=True)
        write_atomic(self.folder / f"step-{step}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))

    def ahead(self, state: TrainState, step: int) -> Sequence[Group]:
        """Draw the groups of a step before it is made, with the weights as they are: those that it has."""
        began = time.perf_counter()
        self._draw(state, step)
        self._ahead[step] = replace(self._ahead[step], earlier_s=time.perf_counter() - began)
        return self._ahead[step].groups

    def groups_of(self, state: TrainState, steps: Sequence[int]) -> tuple[list[list[Group]], dict[str, float]]:
        """The answers to the prompts of each of these steps and their grades, and
        the seconds that both took."""
        rows, seeds, places = list[int](), list[int](), list[slice]()
        for step in steps:
            of_step = state.sampler.rows(step)
            places.append(slice(len(rows), len(rows) + len(of_step)))
            rows += of_step
            seeds += seeds_of(state.store, of_step, seed=self.recipe.seed, step=step)
        groups, timing = self._answered(state, state.store, rows, seeds, num=self.options.samples)
        return [groups[place] for place in places], timing

    def held_out(self, state: TrainState, store: RowStore, rows: Sequence[int]) -> list[Group]:
        """The answers to held-out prompts, with the same random numbers at every call."""
        seeds = seeds_of(store, rows, seed=self.recipe.seed, step=HELD_OUT)
        return self._answered(state, store, rows, seeds, num=self.options.held_out_samples, reports=True)[0]

    def _answered(
        self,
        state: TrainState,
        store: RowStore,
        rows: Sequence[int],
        seeds: Sequence[int],
        *,
        num: int,
        reports: bool = False,
    ) -> tuple[list[Group], dict[str, float]]:
        """`num` answers to each of these rows of a store, drawn by the model as it is now, and graded.
        `reports`: says how far it is; a step is soon made. Ranks draw answers to some of the prompts
        each, the first one grades all."""
        began, futures, world = time.perf_counter(), dict[int, list[Future[Grade]]](), state.world
        num_mine, ended = len(range(world.rank, len(rows), world.size)), list[int]()

        def grade(at: int, answers: Sequence[DrawnAnswer]) -> None:
            if world.is_first:
                futures[at] = self._submitted(store, rows[at], answers)
            ended.append(at)
            if reports:
                self.tick("draw", len(ended) * num, num_mine * num)

        options = self.options
        settings = Draw(
            renderer=self.renderer,
            num=num,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            streams=resolved(options.streams),
        )
        prompts = [store.row(row).ids.tolist() for row in rows]
        answers = draw_together(state, prompts, seeds, settings, on_answers=grade)
        drawn_s = time.perf_counter() - began
        if world.is_first:
            left = [at for at in range(len(rows)) if at not in futures]
            futures |= {at: self._submitted(store, rows[at], answers[at]) for at in left}
        grades = first_grades(world, [[future.result() for future in futures[at]] for at in sorted(futures)])
        groups = [self._graded(*of_row) for of_row in zip(rows, answers, grades, strict=True)]
        self.notes.of_grades(groups)
        return groups, {"draw": drawn_s, "grade": time.perf_counter() - began - drawn_s}

    def _submitted(self, store: RowStore, row: int, answers: Sequence[DrawnAnswer]) -> list[Future[Grade]]:
        item, prefix = self.prompts[store][row].kept, begun_answer(self.renderer.tokenizer, store.row(row).ids.tolist())
        of_row = [Answer(drawn.text, ended=drawn.ended, tokens=len(drawn.ids), prefix=prefix) for drawn in answers]
        return [self.pool.submit(answer, item) for answer in of_row]

    def _graded(self, row: int, answers: Sequence[DrawnAnswer], grades: Sequence[Grade]) -> Group:
        drops_cut = self.options.cut == "drop"
        rewards = [
            None if drops_cut and not answer.ended else grade.reward
            for answer, grade in zip(answers, grades, strict=True)
        ]
        return Group(row, answers, grades, rewards)

    def view(self, state: TrainState, groups: Sequence[Group], old: Sequence[NDArray[np.float32]] = ()) -> TrainState:
        """The state with the answers of these groups as its rows, see `_learnt`. `old`: [N] of each of these
        rows, log π_old; none: the weights that learn have drawn them."""
        view = self._learnt(state, groups)
        _fill(view, "old", old)
        if self.options.kl:
            with state.attachment.adapter_disabled():
                _fill(view, "reference", self.measured(view))
        return view

    def _learnt(self, state: TrainState, groups: Sequence[Group]) -> TrainState:
        """The state with those answers as its rows that teach something, which have all other answers' share in
        the divisor too; the shortest one where none does, for an update without a gradient."""
        options, counted = self.options, self._counted(groups)
        learnt = [answer for answer in counted if answer.advantage != 0 or options.kl]
        learnt = learnt or [min(counted, key=lambda answer: answer.num_tokens)]
        step_divisor = divisor([answer.num_tokens for answer in counted], options)
        store = AnswerStore([self._row(state.store, *answer) for answer in learnt], step_divisor)
        return over_answers(state, store, shares=self.shares)

    def _counted(self, groups: Sequence[Group]) -> list[CountedAnswer]:
        counted: list[CountedAnswer] = []
        of_groups = advantages([group.scored for group in groups], self.options)
        for group, of_group in zip(groups, of_groups, strict=True):
            numbers = [i for i, reward in enumerate(group.rewards) if reward is not None]
            counted += [CountedAnswer(group, *pair) for pair in zip(numbers, of_group, strict=True)]
        return counted

    def everything(self, state: TrainState, groups: Sequence[Group]) -> TrainState:
        """The state with all answers of these groups as its rows, whatever their grades."""
        entries = [(group, i) for group in groups for i in range(len(group.answers))]
        store = AnswerStore([self._row(state.store, *entry, 0.0) for entry in entries], 1.0)
        return over_answers(state, store, shares=self.shares)

    def _row(self, store: RowStore, group: Group, i: int, advantage: float) -> Row:
        numbers_NC = numbers_of(group.answers[i], advantage, by_answer=self.options.normalize == "answers")
        source = store.source(group.row)
        drawn = DrawnSource(source.path, source.line, sample=i + 1)
        return answer_row(store.row(group.row).ids, group.answers[i].ids, drawn, numbers_NC)

    @torch.no_grad()
    def measured(self, view: TrainState) -> list[NDArray[np.float32]]:
        """[N] of each row, log π of its tokens as the learner's passes find it, on whichever rank."""
        logps: dict[int, NDArray[np.float32]] = {}
        view.model.train()  # without dropout, and in which layers are recomputed
        for rows in view.sampler.step(1):
            batch = view.collator.batch(rows, step=1)
            logp_N = log_probs(view.model, batch, self.options.temperature, self.output).float().cpu().numpy()
            row_of_N = batch.row_of_N.cpu().numpy()
            logps |= {row: logp_N[row_of_N == b] for b, row in enumerate(batch.row_indices)}
        logps = all_rows(view.world, logps)
        return [logps[row] for row in range(len(view.store))]

    def _refuse_ungraded(self, groups: Sequence[Group], step: int, store: RowStore) -> None:
        failed = failed_grades(groups)
        cut = sum(not answer.ended for group in groups for answer in group.answers)
        num = sum(len(group.grades) for group in groups)
        if len(failed) > (1 - LEAST_GRADED) * num:
            kinds = Counter(grade.kind for _, grade in failed)
            words = ", ".join(f"{FAILURES[kind]} ({times:,})" for kind, times in kinds.most_common() if kind)
            raise UngradedError(
                f"step {step}: {len(failed):,} of {plural(num, 'answer')} have no reward: {words}. "
                f"{first_failure(failed, store)}. The update was not made."
            )
        if not any(group.scored for group in groups):
            raise UngradedError(
                f"step {step}: {cut:,} of {plural(num, 'answer')} were cut at reinforce.max_new_tokens, and "
                "reinforce.cut is drop: none is left to learn from. The update was not made. Raise the one or "
                "leave out the other."
            )


def failed_grades(groups: Sequence[Group]) -> list[tuple[int, Grade]]:
    """The row and the grade of each answer without a reward."""
    return [(group.row, grade) for group in groups for grade in group.grades if grade.reward is None]


def first_failure(failed: Sequence[tuple[int, Grade]], store: RowStore) -> str:
    """The place and the error of the first of these."""
    row, grade = failed[0]
    return f"The first, of {store.source(row)}: {grade.error[-500:].rstrip('.')}"


def over_answers(state: TrainState, store: AnswerStore, *, shares: bool) -> TrainState:
    """The state with these answers as its rows, all of them in one step. `shares`: shared prefixes are computed
    once."""
    sampler = StepSampler(
        rows_I=np.arange(len(store)),
        weights_I=np.ones(len(store)),
        lengths_I=store.lengths,
        rows_per_step=len(store),
        tokens_per_pass=state.sampler.tokens_per_pass,
        layout=state.sampler.layout,
        seed=state.sampler.seed,
        keys_of=(lambda row: store.row(row).ids) if shares else None,
        pass_cost=state.sampler.pass_cost,
        part=state.sampler.part,
    )
    as_rows = cast(RowStore, store)  # all that steps and batches read of one
    collator = replace(state.collator, store=as_rows, shares=shares)
    return replace(state, store=as_rows, collator=collator, sampler=sampler, draw=None)


def seeds_of(store: RowStore, rows: Sequence[int], *, seed: int, step: int) -> list[int]:
    """The seed of the answers to each prompt, from its content: other rows of the step, or their order, change
    none. A prompt that is there twice gets two."""
    seen, seeds = Counter[int](), list[int]()
    for content in store.hashes[list(rows)]:
        key = np.array([content], np.uint64).view(np.int64)
        seeds.append(int(sort_keys(key, seed, step, salt=SEEDS, copy=seen[int(content)])[0] >> np.uint64(1)))
        seen[int(content)] += 1
    return seeds


def values_of_answers(answers: Sequence[DrawnAnswer]) -> JsonObject:
    """Values of a step: the lengths of its answers, and how sure the model was of their tokens."""
    lengths = [len(answer.ids) for answer in answers]
    return {
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "answer_tokens": sum(lengths) / len(lengths),
        "longest_answer": max(lengths),
        "surprise": -math.fsum(logp for answer in answers for logp in answer.logps) / sum(lengths),
    }


def _fill(view: TrainState, column: str, logps: Sequence[NDArray[np.float32]]) -> None:
    """Write log-probabilities [N] of each row into a column of its numbers."""
    for row, logps_N in enumerate(logps):
        numbers_NC = view.store.row(row).values_NC
        assert numbers_NC is not None, "its rows are answers"
        numbers_NC[:, VALUE_COLUMNS.index(column)] = logps_N


def numbers_of(
    answer: DrawnAnswer, advantage: float | NDArray[np.float32], *, by_answer: bool = False
) -> NDArray[np.float32]:
    """[N, C], see `VALUE_COLUMNS`. `advantage`: of the answer, or [N] of its tokens."""
    num = len(answer.ids)
    numbers_NC = np.full((num, len(VALUE_COLUMNS)), np.nan, np.float32)
    numbers_NC[:, 0], numbers_NC[:, 1], numbers_NC[:, 2] = advantage, 1 / num if by_answer else 1, answer.logps
    return numbers_NC


def _values_of(groups: Sequence[Group]) -> JsonObject:
    """Values of a step: rewards and failed grades of its answers, and `values_of_answers`."""
    grades = [grade for group in groups for grade in group.grades]
    answers = [answer for group in groups for answer in group.answers]
    rewards = np.array([grade.reward for grade in grades if grade.reward is not None])
    scores = mean_scores([grade.scores for grade in grades])
    failed = Counter(grade.kind for grade in grades if grade.kind is not None)
    return {
        REWARD_KEY: float(rewards.mean()),
        "reward_deviation": float(rewards.std()),
        "spread": sum(has_spread(group.scored) for group in groups) / len(groups),
        "answers": len(answers),
        **values_of_answers(answers),
        **({"scores": scores} if scores else {}),
        **({"unscored": dict(sorted(failed.items()))} if failed else {}),
        **({"unread": unread} if (unread := sum(grade.is_unread for grade in grades)) else {}),
    }


def _values_of_tokens(world: World, seen: Seen, options: Reinforce) -> Record:
    """Values of a step: the mismatch of its tokens, on all ranks, with what drew them, and what became of their
    losses."""
    by_row = all_rows(world, {row: sums_S.cpu().numpy() for row, sums_S in seen.items()})
    if not by_row:
        return {}
    sums_BS = torch.tensor(np.stack([by_row[row] for row in sorted(by_row)])).double()
    sums = dict(zip(STATS, sums_BS.sum(0).tolist(), strict=True))
    shares = ("mismatch", "corrected", "clipped_low", "clipped_high")
    values = {key: sums[key] / sums["tokens"] for key in shares}
    values["largest_mismatch"] = float(sums_BS[:, STATS.index("largest")].max())
    return values | ({"kl": sums["kl"] / sums["tokens"]} if options.kl else {})

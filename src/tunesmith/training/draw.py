"""Draws what a step of task reinforce learns: answers to its prompts, their grades, and what each is worth.

A draw is a function of the weights, the seed, the step, the prompts and the grades. Grades are kept by the digest of
all they follow from, so that a resumed run gets those that it got before, also of a judge that answers otherwise today.
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
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.answers import AnswerStore, DrawnSource, answer_row
from tunesmith.data.dataset import RowStore
from tunesmith.data.renderer import Renderer
from tunesmith.data.sampler import StepSampler, sort_keys
from tunesmith.errors import UngradedError
from tunesmith.generation.draws import Draw, DrawnAnswer, draw_answers, drawing
from tunesmith.graders.grade import FAILURES, Answer, Grade
from tunesmith.graders.kept import KeptGrades
from tunesmith.graders.pool import Pool
from tunesmith.phrases import plural
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.atomic import storing, to_json, write_atomic
from tunesmith.tasks.policy_losses import STATS, VALUE_COLUMNS, Seen, log_probs, policy_loss_sum
from tunesmith.tasks.reinforce import advantages, divisor, has_spread
from tunesmith.training.state import Drawn, TrainState
from tunesmith.types import Example, JsonObject, Record, Row

SEEDS = 2**64 - 7
"""Purpose of the random numbers that draw answers, see `sampler.sort_keys`."""
HELD_OUT = 0
"""The step by whose random numbers held-out prompts are answered, before training and after."""
LEAST_GRADED = 0.5
"""Share of a step's answers without which it is not learnt."""


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt, and their grades."""

    row: int
    answers: Sequence[DrawnAnswer]
    grades: Sequence[Grade]

    rewards: Sequence[float | None]
    """None: the answer has no reward, or was cut and is left out."""

    @property
    def scored(self) -> list[float]:
        """The rewards of the answers that count."""
        return [reward for reward in self.rewards if reward is not None]


Worth = tuple[Group, int, float]
"""An answer that counts, by its group and its number in it, and its advantage."""


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
    folder: Path | None = None
    """Folder in which answers are kept; None: they are not."""
    _ahead: dict[int, tuple[list[Group], dict[str, float]]] = field(default_factory=dict)
    """Groups of a step that were drawn before it."""

    def __post_init__(self) -> None:
        weakref.finalize(self, self.pool.close)  # of a run that is prepared and not taken

    @property
    def options(self) -> Reinforce:
        return self.recipe.reinforce

    def close(self) -> None:
        """End the processes of the grader."""
        self.pool.close()

    def __call__(self, state: TrainState, step: int) -> Drawn:
        """The answers that a step learns. Raises UngradedError where the grader fails for more than half of them."""
        groups, timing = self._ahead.pop(step) if step in self._ahead else self.groups_of(state, step)
        self._refuse_ungraded(groups, step)
        self.kept.flush()
        self._write(groups, state.store, step)
        view, seen = self.view(state, groups), dict[int, Tensor]()
        loss_sum = state.task.loss_sum
        if isinstance(loss_sum, partial) and loss_sum.func is policy_loss_sum:  # and no other that a caller gave
            loss_sum = partial(loss_sum, seen=seen)
        view = replace(view, task=replace(view.task, loss_sum=loss_sum))
        values = _values_of(groups)
        return Drawn(view, [group.row for group in groups], lambda: {**values, **_found(seen, self.options)}, timing)

    def keep_in(self, folder: Path) -> None:
        """Keep grades and answers in the folder of a run, and take the grades that are there."""
        self.folder = folder / "rollouts"
        self.kept.keep_in(folder / "grades.jsonl")

    def _write(self, groups: Sequence[Group], store: RowStore, step: int) -> None:
        most = self.options.keep_answers
        if self.folder is None or not most:
            return
        worth = {(id(group), i): advantage for group, i, advantage in self._worth(groups)}
        lines = [
            {
                "source": str(store.source(group.row)),
                "sample": i + 1,
                "text": answer.text,
                "reward": grade.reward,
                "advantage": worth.get((id(group), i)),
                "scores": dict(grade.scores),
                "error": grade.error,
                "ended": answer.ended,
                "tokens": len(answer.ids),
            }
            for group in groups
            for i, (answer, grade) in enumerate(zip(group.answers, group.grades, strict=True))
        ]
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"step-{step - most}.jsonl").unlink(missing_ok=True)
        write_atomic(self.folder / f"step-{step}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))

    def ahead(self, state: TrainState, step: int) -> list[Group]:
        """Draw the groups of a step before it is made, with the weights as they are: those that it has."""
        self._ahead[step] = self.groups_of(state, step)
        self._refuse_ungraded(self._ahead[step][0], step)  # before its grades are kept, with those of held-out answers
        return self._ahead[step][0]

    def groups_of(self, state: TrainState, step: int) -> tuple[list[Group], dict[str, float]]:
        """The answers to the prompts of a step and their grades, and the seconds that both took."""
        return self.drawn(state, state.store, state.sampler.rows(step), step=step, num=self.options.samples)

    def drawn(
        self, state: TrainState, store: RowStore, rows: Sequence[int], *, step: int, num: int
    ) -> tuple[list[Group], dict[str, float]]:
        """`num` answers to each of these rows of a store, drawn by the model as it is now, and graded."""
        began, futures = time.perf_counter(), dict[int, list[Future[Grade]]]()
        seeds, total = seeds_of(store, rows, seed=self.recipe.seed, step=step), len(rows) * num

        def grade(at: int, answers: Sequence[DrawnAnswer]) -> None:
            item = self.prompts[store][rows[at]].kept
            futures[at] = [
                self.pool.submit(Answer(drawn.text, ended=drawn.ended, tokens=len(drawn.ids)), item)
                for drawn in answers
            ]
            if step == HELD_OUT:  # a step is soon made
                self.tick("draw", len(futures) * num, total)

        with drawing(cast(Any, state.model)) as decoder:
            ids = [store.row(row).ids.tolist() for row in rows]
            answers = draw_answers(decoder, ids, seeds, self._how(num), on_answers=grade)
        drawn_s = time.perf_counter() - began
        groups = [self._graded(row, answers[at], futures[at]) for at, row in enumerate(rows)]
        return groups, {"draw": drawn_s, "grade": time.perf_counter() - began - drawn_s}

    def _graded(self, row: int, answers: Sequence[DrawnAnswer], futures: Sequence[Future[Grade]]) -> Group:
        grades, drops_cut = [future.result() for future in futures], self.options.cut == "drop"
        rewards = [
            None if drops_cut and not answer.ended else grade.reward
            for answer, grade in zip(answers, grades, strict=True)
        ]
        return Group(row, answers, grades, rewards)

    def _how(self, num: int) -> Draw:
        options = self.options
        return Draw(
            tokenizer=self.renderer.tokenizer,
            stop_ids=frozenset(self.renderer.stop_ids),
            num=num,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            streams=resolved(options.streams),
            strip=True,
        )

    def view(self, state: TrainState, groups: Sequence[Group]) -> TrainState:
        """The state with the answers of these groups as its rows: those that teach something, which have all other
        answers' share in the divisor too; the shortest one where none does, for an update without a gradient."""
        options, worth = self.options, self._worth(groups)
        lengths = [len(group.answers[i].ids) for group, i, _ in worth]
        learnt = [entry for entry in worth if entry[2] != 0 or options.kl]
        learnt = learnt or [min(worth, key=lambda entry: len(entry[0].answers[entry[1]].ids))]
        store = AnswerStore([self._row(state.store, *entry) for entry in learnt], divisor(lengths, options))
        view = self._over(state, store)
        if options.kl:
            with state.attachment.adapter_disabled():
                reference = self.measured(view)
            at = VALUE_COLUMNS.index("reference")
            for row, logps_N in zip(store.rows, reference, strict=True):
                assert row.values_NC is not None, "made above"
                row.values_NC[:, at] = logps_N
        return view

    def _worth(self, groups: Sequence[Group]) -> list[Worth]:
        worth: list[Worth] = []
        for group, of_group in zip(groups, advantages([group.scored for group in groups], self.options), strict=True):
            counted = [i for i, reward in enumerate(group.rewards) if reward is not None]
            worth += [(group, i, advantage) for i, advantage in zip(counted, of_group, strict=True)]
        return worth

    def everything(self, state: TrainState, groups: Sequence[Group]) -> TrainState:
        """The state with all answers of these groups as its rows, whatever their grades."""
        entries = [(group, i) for group in groups for i in range(len(group.answers))]
        return self._over(state, AnswerStore([self._row(state.store, *entry, 0.0) for entry in entries], 1.0))

    def _row(self, store: RowStore, group: Group, i: int, advantage: float) -> Row:
        numbers_NC = _numbers(group.answers[i], advantage, by_answer=self.options.normalize == "answers")
        source = store.source(group.row)
        drawn = DrawnSource(source.path, source.line, sample=i + 1)
        return answer_row(store.row(group.row).ids, group.answers[i].ids, numbers_NC, drawn)

    def _over(self, state: TrainState, store: AnswerStore) -> TrainState:
        rows_I = np.arange(len(store))
        sampler = StepSampler(
            rows_I=rows_I,
            weights_I=np.ones(len(store)),
            lengths_I=store.lengths,
            rows_per_step=len(store),
            tokens_per_pass=state.sampler.tokens_per_pass,
            layout=state.sampler.layout,
            seed=self.recipe.seed,
            ids_of=(lambda row: store.row(row).ids) if self.shares else None,
            pass_cost=state.sampler.pass_cost,
        )
        as_rows = cast(RowStore, store)  # all that steps and batches read of one
        collator = replace(state.collator, store=as_rows, shares=self.shares)
        return replace(state, store=as_rows, collator=collator, sampler=sampler, draw=None)

    @torch.no_grad()
    def measured(self, view: TrainState) -> list[NDArray[np.float32]]:
        """[N] of each row, log π of its tokens as the learner's passes find it."""
        logps: dict[int, NDArray[np.float32]] = {}
        view.model.train()  # without dropout, and in which layers are recomputed
        for rows in view.sampler.step(1):
            batch = view.collator.batch(rows, draw=1)
            logp_N = log_probs(view.model, batch, self.options.temperature, self.output).float().cpu().numpy()
            row_of_N = batch.row_of_N.cpu().numpy()
            logps |= {row: logp_N[row_of_N == b] for b, row in enumerate(batch.row_indices)}
        return [logps[row] for row in range(len(logps))]

    def _refuse_ungraded(self, groups: Sequence[Group], step: int) -> None:
        grades = [grade for group in groups for grade in group.grades]
        failed = [grade for grade in grades if grade.reward is None]
        cut = sum(not answer.ended for group in groups for answer in group.answers)
        if len(failed) > (1 - LEAST_GRADED) * len(grades):
            first, kinds = failed[0], Counter(grade.kind for grade in failed)
            words = ", ".join(f"{FAILURES[kind]} ({num:,})" for kind, num in kinds.most_common() if kind)
            raise UngradedError(
                f"step {step}: {len(failed):,} of {plural(len(grades), 'answer')} have no reward: {words}. The first: "
                f"{first.error[-500:]}. The update was not made."
            )
        if not any(group.scored for group in groups):
            raise UngradedError(
                f"step {step}: {cut:,} of {plural(len(grades), 'answer')} were cut at reinforce.max_new_tokens, and "
                "reinforce.cut is drop: none is left to learn from. The update was not made. Raise the one or leave "
                "out the other."
            )


def seeds_of(store: RowStore, rows: Sequence[int], *, seed: int, step: int) -> list[int]:
    """The seed of the answers to each prompt, from its content: other rows of the step, or their order, change none. A
    prompt that is there twice gets two."""
    seen, seeds = Counter[int](), list[int]()
    for content in store.hashes[list(rows)]:
        key = np.array([content], np.uint64).view(np.int64)
        seeds.append(int(sort_keys(key, seed, step, salt=SEEDS, copy=seen[int(content)])[0] >> np.uint64(1)))
        seen[int(content)] += 1
    return seeds


def _numbers(answer: DrawnAnswer, advantage: float, *, by_answer: bool) -> NDArray[np.float32]:
    """[N, C], see `VALUE_COLUMNS`."""
    num = len(answer.ids)
    numbers_NC = np.full((num, len(VALUE_COLUMNS)), np.nan, np.float32)
    numbers_NC[:, 0], numbers_NC[:, 1], numbers_NC[:, 2] = advantage, 1 / num if by_answer else 1, answer.logps
    return numbers_NC


def _values_of(groups: Sequence[Group]) -> JsonObject:
    """Values of a step's answers: rewards, lengths, and how sure the model was."""
    grades = [grade for group in groups for grade in group.grades]
    answers = [answer for group in groups for answer in group.answers]
    rewards = np.array([grade.reward for grade in grades if grade.reward is not None])
    names = sorted({name for grade in grades for name in grade.scores})
    failed = Counter(grade.kind for grade in grades if grade.kind is not None)
    lengths = [len(answer.ids) for answer in answers]
    return {
        "reward": float(rewards.mean()),
        "reward_deviation": float(rewards.std()),
        "spread": sum(has_spread(group.scored) for group in groups) / len(groups),
        "answers": len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "answer_tokens": sum(lengths) / len(lengths),
        "longest_answer": max(lengths),
        "surprise": -math.fsum(logp for answer in answers for logp in answer.logps) / sum(lengths),
        **({"scores": {name: _mean_score(grades, name) for name in names}} if names else {}),
        **({"unscored": dict(sorted(failed.items()))} if failed else {}),
    }


def _mean_score(grades: Sequence[Grade], name: str) -> float:
    scores = [grade.scores[name] for grade in grades if name in grade.scores]
    return math.fsum(scores) / len(scores)


def _found(seen: Seen, options: Reinforce) -> Record:
    """Values of the tokens that were learnt: their mismatch with what drew them, and what became of their losses."""
    if not seen:
        return {}
    sums_BS = torch.stack([seen[row] for row in sorted(seen)]).double().cpu()
    of = dict(zip(STATS, sums_BS.sum(0).tolist(), strict=True))
    values = {key: of[key] / of["tokens"] for key in ("mismatch", "corrected", "clipped_low", "clipped_high")}
    values["largest_mismatch"] = float(sums_BS[:, STATS.index("largest")].max())
    return values | ({"kl": of["kl"] / of["tokens"]} if options.kl else {})

"""Graded answers to the prompts of a step, drawn at the step or some steps before it.

They are written as JSON into a checkpoint that lies between a draw and its last step, and sent between ranks,
each of which draws some of them.
"""

# N trained tokens of an answer

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.generation.draws import Draw, DrawnAnswer, draw_answers, drawing
from tunesmith.graders.grade import Grade
from tunesmith.parallel.world import World
from tunesmith.training.state import TrainState
from tunesmith.types import REWARD_KEY, JsonObject


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

    def records(self) -> list[JsonObject]:
        """Each answer with its grade, as files and results have it."""
        return [
            {
                "text": answer.text,
                REWARD_KEY: grade.reward,
                "scores": dict(grade.scores),
                "ended": answer.ended,
                "tokens": len(answer.ids),
            }
            for answer, grade in zip(self.answers, self.grades, strict=True)
        ]

    def values(self) -> JsonObject:
        """As JSON; floats are exact in it."""
        return asdict(self)

    @classmethod
    def of(cls, values: JsonObject) -> Group:
        """The group that has these values."""
        grades = [Grade(**grade) for grade in values["grades"]]
        return cls(values["row"], [_answer(answer) for answer in values["answers"]], grades, values["rewards"])


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """The groups of one step."""

    groups: Sequence[Group]
    old: Sequence[NDArray[np.float32]] = ()
    """[N] of each row that the step learns: log π_old, by the weights that drew it. Empty: the weights that the
    step updates have drawn them."""
    timing: dict[str, float] = field(default_factory=dict)
    earlier_s: float = 0.0
    """Seconds that the draw took, where it was made before the step began."""

    def values(self) -> JsonObject:
        """As JSON, without the seconds that the draw took."""
        old = [logps_N.tolist() for logps_N in self.old]
        return {"groups": [group.values() for group in self.groups], "old": old}

    @classmethod
    def of(cls, values: JsonObject) -> DrawnStep:
        """The step that has these values."""
        old: list[Any] = [np.array(logps, np.float32) for logps in values["old"]]
        return cls([Group.of(group) for group in values["groups"]], old)


def draw_together(
    state: TrainState,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Draw,
    on_answers: Callable[[int, Sequence[DrawnAnswer]], None] = lambda prompt, answers: None,
) -> list[list[DrawnAnswer]]:
    """As `draw_answers`, by the model as it is now; each rank draws the answers to some of the prompts, of which
    `on_answers` gets the number."""
    world, mine = state.world, range(state.world.rank, len(prompts), state.world.size)
    with drawing(cast(Any, state.model)) as decoder:
        drawn = draw_answers(
            decoder,
            [prompts[at] for at in mine],
            [seeds[at] for at in mine],
            settings,
            on_answers=lambda number, answers: on_answers(mine[number], answers),
        )
    return all_answers(world, drawn, len(prompts))


def all_answers(world: World, mine: Sequence[Sequence[DrawnAnswer]], num: int) -> list[list[DrawnAnswer]]:
    """The answers to all `num` prompts in their order, of which this rank has drawn a share."""
    if world.size == 1:
        return list(map(list, mine))
    ranks = world.gather_values([[asdict(answer) for answer in of_prompt] for of_prompt in mine])
    return [[_answer(values) for values in ranks[at % world.size][at // world.size]] for at in range(num)]


def first_grades(world: World, grades: Sequence[Sequence[Grade]]) -> list[list[Grade]]:
    """The grades of the first rank, which makes all of them, on every rank."""
    if world.size == 1:
        return list(map(list, grades))
    first = world.gather_values([[asdict(grade) for grade in of_prompt] for of_prompt in grades])[0]
    return [[Grade(**values) for values in of_prompt] for of_prompt in first]


def all_rows(world: World, mine: Mapping[int, NDArray[np.float32]]) -> dict[int, NDArray[np.float32]]:
    """The values of all rows, of which each rank has computed some."""
    if world.size == 1:
        return dict(mine)
    ranks = world.gather_values([(row, values.tolist()) for row, values in sorted(mine.items())])
    return {row: np.array(values, np.float32) for of_rank in ranks for row, values in of_rank}


def _answer(values: JsonObject) -> DrawnAnswer:
    return DrawnAnswer(tuple(values["ids"]), tuple(values["logps"]), values["text"], values["ended"])

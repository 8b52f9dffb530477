"""Sentences on the answers that a run draws and the grades that they get, each said once in a run's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tunesmith.phrases import listed, plural
from tunesmith.tasks.reinforce import has_spread
from tunesmith.training.groups import Group

IN_VAIN = 3
"""Steps in a row without a gradient after which that is said."""


@dataclass
class DrawNotes:
    """Looks at the groups of a run as they are drawn."""

    say: Callable[[str], None] = lambda text: None
    """Receives each sentence."""
    _named: set[str] = field(default_factory=set)
    """Names of the numbers that were named."""
    _in_vain: int = 0
    """Steps in a row, up to now, in which no group had a spread."""
    _is_said: bool = False
    """Whether steps in vain were named."""

    def of_grades(self, groups: Sequence[Group]) -> None:
        """Name the further numbers of the grader that were none."""
        values: dict[str, list[str]] = {}
        grades = [grade for group in groups for grade in group.grades]
        for grade in grades:
            for name, value in grade.left_out.items():
                values.setdefault(name, []).append(value)
        for name in sorted(values.keys() - self._named):
            self._named.add(name)
            shown, num = listed(dict.fromkeys(values[name]), 3), plural(len(grades), "answer")
            self.say(
                f"the grader's score {name!r} is no finite number in {len(values[name]):,} of {num} "
                f"({shown}): left out of its mean, here and later; the rewards count as they are. Let the grader give "
                "a number, or leave the name out"
            )

    def of_step(self, groups: Sequence[Group], step: int, *, teaches: bool) -> None:
        """Say when step after step has nothing to learn from. `teaches`: equal rewards are learnt from too."""
        self._in_vain = 0 if teaches or any(has_spread(group.scored) for group in groups) else self._in_vain + 1
        if self._in_vain < IN_VAIN or self._is_said:
            return
        self._is_said = True
        rewards = [reward for group in groups for reward in group.scored]
        equal = f", and all get {rewards[0]:g}" if len(set(rewards)) == 1 else ""
        self.say(
            f"steps {step - IN_VAIN + 1:,} to {step:,}: no prompt has answers of different rewards{equal}, so these "
            "updates learn nothing. Try the grader with the model: tunesmith grade DATA --grader GRADER --model MODEL "
            "says whether more reinforce.samples, other prompts or a finer grader would help"
        )

"""Prefer: of two answers to a prompt, the better one is made likelier than the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.errors import DataError
from tunesmith.phrases import plural
from tunesmith.tasks.preference_losses import losses_of
from tunesmith.tasks.task import OwnSection, Rates, Task
from tunesmith.types import Choice, JsonObject

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.recipe.objectives import Prefer
    from tunesmith.tasks.task import Side


def _record(text: str, answer: str | None = None) -> JsonObject:
    if answer is None:
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text, "chosen": answer, "rejected": f"{answer} {answer}"}


def _from_rows(options: Prefer, sides: Sequence[Side]) -> list[Choice]:
    """The loss that rows are made for, and of unpaired ones weights by which both sides weigh the same."""
    import numpy as np

    (store, train_I), *_ = sides
    unpaired = bool((store.branches.counts[train_I] == 1).all())
    kinds = {True: "answers with a label", False: "pairs of answers"}
    what, others = kinds[unpaired], kinds[not unpaired]
    for side, rows_I in sides:
        other_I = rows_I[(side.branches.counts[rows_I] == 1) != unpaired]
        if len(other_I):
            raise DataError(f"{side.source(int(other_I[0]))}: it is of {others}, other rows of {what}. Use one kind.")
    loss, fitting = options.loss, "kto" if unpaired else "dpo"
    if loss != "auto" and unpaired != (loss == "kto"):
        raise DataError(f"prefer.loss: {loss}: the rows are {what}. Leave it out, or use {fitting}.")
    choices = [Choice("prefer.loss", fitting, f"rows are {what}")] if loss == "auto" else []
    if not unpaired:
        num = sum(int(np.count_nonzero(side.branches.firsts[rows_I])) for side, rows_I in sides)
        unused = num > 0 and not options.has_margin
        why = f"{loss} has no margin: the margins of {plural(num, 'row')} are not used"
        return [*choices, *([Choice("prefer.margin", 0.0, why)] if unused else [])]
    if len(sides) > 1 and len(np.unique(store.inputs[train_I])) < 2:
        raise DataError(f"{store.source(int(train_I[0]))}: all training rows have this prompt: kto needs several.")
    return [*choices, *_weights(options, store.branches.firsts[train_I] > 0)]


def _weights(options: Prefer, wanted_I: NDArray[np.bool_]) -> list[Choice]:
    """Options of kto that the labels of the training rows decide. Raises DataError where they are all alike."""
    counts = {"desirable": int(wanted_I.sum()), "undesirable": int((~wanted_I).sum())}
    missing = [key for key in counts if getattr(options, key) is None]
    if missing and not all(counts.values()):
        raise DataError(f"data.train: all rows have label {str(bool(wanted_I[0])).lower()}: kto needs both.")
    why = f"{counts['desirable']:,} of {len(wanted_I):,} answers are wanted: both sides weigh the same"
    return [Choice(f"prefer.{key}", max(counts.values()) / counts[key], why) for key in missing]


PREFER = Task(
    name="prefer",
    doc="The better of two answers to a prompt.",
    purpose="prefer the better answers",
    shapes=("preference", "unpaired"),
    heads={"causal": "next_token"},
    losses=losses_of,
    encoder="tunesmith.data.branch_encoders:PreferenceEncoder",
    record=_record,
    is_chat=True,
    writes_answers=True,
    answer_key="answer",
    detected="rows compare answers to a prompt",
    on_overlong=("error", "the model would learn to tell a cut answer by its missing end"),
    headline_metrics=("preference_accuracy", "margin", "chosen_shift"),
    next_commands=(("chat", "--compare"), ("serve",), ("show",)),
    compares=True,
    outcome="pairs",
    rows_per_step=32,
    rates=Rates(adapter=(2e-4, 5e-6), full=(1e-6, 5e-7)),
    section=OwnSection("prefer", from_rows=_from_rows, has_prepass=lambda options: options.loss == "kto"),
)

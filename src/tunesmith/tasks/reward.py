"""Reward: a number for an answer to a prompt, higher for the better of several."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError
from tunesmith.tasks.prefer import LARGE, check_compared
from tunesmith.tasks.reward_losses import reward_loss_sum, reward_measure
from tunesmith.types import Choice, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.data.dataset import RowStore
    from tunesmith.data.renderer import EncoderSettings, RowEncoder
    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.recipe.schema import Recipe


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.reward import RewardEncoder

    return RewardEncoder(settings.tokenizer, settings.fast, settings.limit, settings.kind, settings.date)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"prompt": text, "completion": text}
    return {"prompt": text, "chosen": answer, "rejected": f"{answer} {answer}"}


def _rate(is_adapter: bool, num_parameters: int) -> tuple[float, str]:
    full = 1e-5 if num_parameters >= LARGE else 3e-5
    return (1e-4, "usual for rewards with an adapter") if is_adapter else (full, "usual for rewards in full tuning")


def _use_rows(recipe: Recipe, sides: Sequence[tuple[RowStore, NDArray[np.int64]]]) -> list[Choice]:
    """Few passes, since a reward learns by heart soon."""
    for store, rows_I in sides:
        single_I = rows_I[store.branches.counts[rows_I] < 2]
        if len(single_I):
            raise DataError(
                f"{store.source(int(single_I[0]))}: it has one answer: a reward is learnt from two or more."
            )
    num = len(sides[0][1])
    epochs = 2.0 if num < 1000 else 1.0
    choice = Choice("train.epochs", epochs, f"{num:,} rows; rewards of more passes fit their rows and no others")
    return [choice] if recipe.train.epochs == "auto" else []


def _bound(task: Task, recipe: Recipe, output: OutputLayer | None) -> Task:
    how = {"options": recipe.reward}
    return replace(task, loss_sum=partial(task.loss_sum, **how), measure=partial(task.measure, **how))


REWARD = Task(
    name="reward",
    doc="A number for an answer, higher for the better one.",
    shapes=("scored_answers",),
    heads={"causal": "sequence", "encoder": "sequence"},
    loss_sum=reward_loss_sum,
    measure=reward_measure,
    encoder=_encoder,
    record=_record,
    is_chat=True,
    learns_classes=True,
    answer_key="reward",
    detected="rows have several answers to a prompt, in order or with scores",
    on_overlong=("error", "of a cut answer the model would learn that it was cut"),
    headline_metrics=("preference_accuracy", "margin", "calibration_error"),
    next_commands=(("predict", "FILE"), ("show",)),
    outcome="rewards",
    rows_per_step=32,
    rate=_rate,
    check=check_compared,
    use_rows=_use_rows,
    section="reward",
    bound=_bound,
)

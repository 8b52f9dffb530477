"""Prefer: of two answers to a prompt, the better one is made likelier than the other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RecipeError
from tunesmith.tasks.losses import token_measure
from tunesmith.tasks.preference_losses import preference_loss_sum, preference_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.drafts import EncoderSettings, RowEncoder
    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.recipe.schema import Recipe

LARGE = 1e9
"""Weights from which a model counts as large."""


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.preference import PreferenceEncoder

    return PreferenceEncoder(settings.tokenizer, settings.fast, settings.limit, settings.date)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text, "chosen": answer, "rejected": f"{answer} {answer}"}


def _rate(is_adapter: bool, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate: far lower than on answers, since a preference moves a model that can answer already."""
    is_large = num_parameters >= LARGE
    where = f"of a model {'above' if is_large else 'below'} a billion weights"
    if is_adapter:
        return (5e-6 if is_large else 2e-4), f"usual for preferences with an adapter {where}"
    return (5e-7 if is_large else 1e-6), f"usual for preferences in full tuning {where}"


def _check(recipe: Recipe) -> None:
    """Raise RecipeError for options that would change what is compared, or change nothing."""
    if recipe.data.too_long == "cut":
        raise RecipeError(
            "data.too_long: cut: of two answers the one without its end would be recognized by that. Use error or drop."
        )
    for option in ("label_smoothing", "z_loss", "neftune_alpha"):
        if getattr(recipe.loss, option):
            way = "Use prefer.label_smoothing" if option == "label_smoothing" else "Leave it out"
            raise RecipeError(f"loss.{option}: is for the likelihood of tokens; task prefer compares answers. {way}.")


def _bound(task: Task, recipe: Recipe, output: OutputLayer | None) -> Task:
    how: dict[str, Any] = {"options": recipe.prefer, "output": output}
    measure, text_measure = partial(task.measure, **how), partial(token_measure, output=output)
    return replace(task, loss_sum=partial(task.loss_sum, **how), measure=measure, text_measure=text_measure)


PREFER = Task(
    name="prefer",
    doc="The better of two answers to a prompt.",
    shapes=("preference",),
    heads={"causal": "next_token"},
    loss_sum=preference_loss_sum,
    measure=preference_measure,
    encoder=_encoder,
    record=_record,
    is_chat=True,
    writes_answers=True,
    answer_key="answer",
    detected="rows compare two answers to a prompt",
    on_overlong=("error", "of a cut answer the model would learn that it was cut"),
    headline_metrics=("preference_accuracy", "margin", "chosen_shift"),
    next_commands=(("chat", "--compare"), ("show",)),
    compares=True,
    draws=False,
    outcome="pairs",
    rows_per_step=32,
    rate=_rate,
    check=_check,
    section="prefer",
    bound=_bound,
)

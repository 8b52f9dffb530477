"""Changes to try next, by what a run measured: a sentence of why, and settings that may be better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.evaluation.compare import never_right
from tunesmith.phrases import command
from tunesmith.recipe.schema import Optim, Train, resolved
from tunesmith.types import Record

MOST_TRIED = 3
STILL_FALLING = 0.01
"""Share of the loss by which the last evaluation is below the one before, if training may not be done."""
WORSE_THAN_RANDOM = 1.1
"""Least loss of a new head, as a multiple of its untrained loss, at which steps were too large."""

Course = Sequence[tuple[int, Record]]
"""(step, values) of the evaluations, as `RunSeries.course` has them."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One change and its reason."""

    why: str
    settings: tuple[str, ...]
    """In the form of --set."""


def next_command(run: Path, advice: Record) -> str:
    """The command that trains again as `run` was, but for the settings of an advice in plain values."""
    words = [word for setting in advice["settings"] for word in ("--set", setting)]
    return command("train", "--recipe", run / "recipe.yaml", *words)


def try_next(report: Record, course: Course, *, optim: Optim, train: Train, has_eval: bool) -> list[Advice]:
    """At most `MOST_TRIED` changes, the one that mends most first; none if nothing measured calls for one.

    `optim`, `train`: these sections of the run's recipe. `has_eval`: whether it has a file of held-out rows.
    """
    if report["metrics"]["after"] is None:
        why = "Nothing was measured: hold out a tenth of the rows."
        return [] if has_eval else [Advice(why, ("data.held_out=0.1",))]
    advices: list[Advice] = []
    rate = resolved(optim.lr) if optim.lr != "auto" else 0.0
    losses = [values["loss"] for _, values in sorted(course, key=lambda pair: pair[0])]
    if rate and report.get("new_head") and len(losses) > 1 and min(losses[1:]) > WORSE_THAN_RANDOM * losses[0]:
        why = "Worse than its new head was at random: take smaller steps."
        advices.append(Advice(why, (f"optim.lr={rate / 10:.3g}",)))
    never = list(never_right(report["details"]["after"], weights=report.get("class_weights")))
    if any("class_weights=balanced" in sentence for sentence in never):
        advices.append(Advice(f"{never[0]} Let rare classes count more.", ("train.class_weights=balanced",)))
    loss = report["changes"].get("loss")
    if rate and loss and loss["is_clear"] and loss["value"] > 0:
        advices.append(Advice("The held-out loss rose: take smaller steps.", (f"optim.lr={rate / 3:.3g}",)))
    elif rate and report.get("general") and report["general"]["past_bound"]:
        why = "General ability was lost: a lower rate keeps more of it."
        advices.append(Advice(why, (f"optim.lr={rate / 3:.3g}",)))
    epochs = train.epochs
    is_whole = epochs != "auto" and not train.max_steps and report["kept"].get("step") in (None, report["steps"])
    if is_whole and len(losses) > 2 and min(losses[:-1]) - losses[-1] > STILL_FALLING * losses[-1]:
        why = "The held-out loss was still falling at the end: train longer."
        advices.append(Advice(why, (f"train.epochs={2 * float(epochs):g}",)))
    return advices[:MOST_TRIED]

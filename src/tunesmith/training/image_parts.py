"""Runs whose rows have images: the parts of the model that are trained, and the options that are refused."""

from __future__ import annotations

from torch import nn

from tunesmith.data.splits import Splits
from tunesmith.errors import RecipeError
from tunesmith.methods.targets import is_inside
from tunesmith.models.vision import part_modules
from tunesmith.phrases import percent
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.forecast import Forecast
from tunesmith.planning.tower import Shown
from tunesmith.recipe.methods import FullMethod
from tunesmith.types import Aside, Choice

SEEING_METHODS = ("lora", "dora", "full")
"""Methods that are proved on models that see."""


def decide_seeing(decisions: Decisions, rows: Splits) -> None:
    """Decide what full tuning trains where rows have images. Raises RecipeError for options that forbid
    images."""
    recipe = decisions.recipe
    if not rows.has_images:
        return
    if recipe.method.name not in SEEING_METHODS:
        names = ", ".join(SEEING_METHODS)
        raise RecipeError(f"method.name: {recipe.method.name}: not with images in the rows yet. Use one of {names}.")
    if recipe.devices not in ("auto", 1) or recipe.shard is True:
        raise RecipeError("devices, shard: rows with images are trained on one device. Set devices: 1, and no shard.")
    if isinstance(recipe.method, FullMethod) and not recipe.method.train:
        reason = "the vision tower and its projector stay as they are: name projector or vision here to train them"
        decisions.decide(Choice("method.train", ("language",), reason))


def seeing_notes(model: nn.Module, rows: Splits) -> list[str]:
    """A line about what is trained and what is frozen of a model that sees, where rows have images."""
    if not rows.has_images:
        return []
    phrases = []
    for word, modules in part_modules(model).items():
        weights = [weight for name, weight in model.named_parameters() if is_inside(name, modules)]
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        total = sum(weight.numel() for weight in weights)
        state = f"{trained:,} weights trained" if trained else "frozen"
        phrases.append(f"{word} {state} ({total:,} weights)")
    return [Aside(f"images: {', '.join(phrases)}")]


def forecast_notes(forecast: Forecast, shown: Shown | None) -> list[str]:
    """A line about the images of a run and the share of its time that they take."""
    if shown is None:
        return []
    tokens = f"{shown.mean.tokens:,} tokens each on average, {shown.largest.tokens:,} the largest"
    text, duration = f"images: {shown.different:,} different ones, {tokens}", forecast.duration
    if duration is not None and "seeing" in duration.counts:
        passes = duration.counts["seeing"]
        share = percent(passes * duration.prices["seeing"] / duration.total, 0)
        text += f"; {passes:,.0f} passes of the frozen vision tower, {share} of the run's time"
    return [Aside(text)]

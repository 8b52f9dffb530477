"""Runs whose rows have images: what is trained of the model, and what is refused by name."""

from __future__ import annotations

from torch import nn

from tunesmith.data.splits import Splits
from tunesmith.errors import RecipeError
from tunesmith.methods.targets import is_inside
from tunesmith.models.image_features import MEMORY_SHARE, kept_vectors
from tunesmith.models.vision import part_modules
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.devices import room
from tunesmith.recipe.methods import FullMethod
from tunesmith.types import Aside, Choice

METHODS = ("lora", "dora", "full")
"""Methods that are proved on models that see."""
UNFORESEEN = "rows have images: the forecast counts the vision tower's weights, but not what its passes take"
PADDED = "padded batches: rows have images, and are not packed with others yet; slower, same result"


def decide_seeing(decisions: Decisions, rows: Splits) -> None:
    """Decide what full tuning trains where rows have images. Raises RecipeError for what cannot be done with them."""
    recipe = decisions.recipe
    if not rows.has_images:
        return
    if recipe.method.name not in METHODS:
        names = ", ".join(METHODS)
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
    memory = kept_vectors(model)
    memory.room = min(memory.room, int(MEMORY_SHARE * room("cpu")))  # less in a container, which psutil does not see
    phrases = []
    for word, modules in part_modules(model).items():
        weights = [weight for name, weight in model.named_parameters() if is_inside(name, modules)]
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        total = sum(weight.numel() for weight in weights)
        phrases.append(f"{word} {'frozen' if not trained else f'{trained:,} weights trained'} ({total:,} weights)")
    return [Aside(f"images: {', '.join(phrases)}"), Aside(UNFORESEEN)]

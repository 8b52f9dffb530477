"""Whether the prefix that rows of a step share is computed once, as far as rows, recipe and config tell."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from tunesmith.data.branches import lines_of
from tunesmith.data.dataset import RowStore
from tunesmith.data.prefixes import prefix_groups
from tunesmith.data.sampler import StepSampler
from tunesmith.methods import METHODS
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.types import Choice, Row

LEAST_SAVED = 0.05
"""Share of the tokens that has to be saved: each shared prefix is one more piece of a micro-batch."""
PROBE_STEPS, PROBE_ROWS = 4, 3
KEY = "kernels.shared_beginnings"


@dataclass(frozen=True, slots=True)
class CommonPrefixes:
    """Tokens that rows share."""

    saved: float
    """Share of the tokens of the first steps that need not be computed."""
    probe: tuple[Row, ...]
    """Some rows with a common prefix."""


def shared_prefixes(plan: StepSampler, store: RowStore) -> CommonPrefixes:
    """Tokens shared by rows of the first steps, whoever computes them: a function of the plan alone."""
    plan = filled_by(replace(plan, part=(0, 1)), store)
    tokens, computed = 0, 0
    probe: tuple[Row, ...] = ()
    for step in range(1, min(PROBE_STEPS, plan.steps_per_epoch) + 1):
        for members in plan.step(step):
            rows = [line for i in members for line in lines_of(store.row(i))]
            tokens += sum(len(row.ids) for row in rows)
            for family in prefix_groups([row.ids for row in rows]):
                computed += family.prefix + sum(len(rows[i].ids) - family.prefix for i in family.members)
                if family.prefix and not probe:
                    probe = tuple(rows[i] for i in family.members[:PROBE_ROWS])
    return CommonPrefixes(1 - computed / tokens, probe)


def decide_sharing(model: nn.Module, recipe: Recipe, shared: CommonPrefixes) -> Choice:
    """For packed batches of a causal model without token types. Whether the model then gives the same answers is not
    checked here: it may have no weights yet."""
    if shared.saved < LEAST_SAVED:
        return Choice(KEY, False, f"what rows of a step begin with alike is {shared.saved:.0%} of their tokens")
    what = f"rows of a step begin alike: {shared.saved:.0%} of their tokens"
    if recipe.kernels == "plain":
        return Choice(KEY, False, f"{what} could be computed once, but kernels: plain leaves them")
    if TASKS[resolved(recipe.task)].draws and (random := random_option(model, recipe)):
        return Choice(KEY, False, f"{what} could be computed once, but {random} draws anew for each row")
    return Choice(KEY, True, f"{what} are computed once for all; counted are the tokens of the rows")


def filled_by(plan: StepSampler, store: RowStore) -> StepSampler:
    """The steps again, in micro-batches filled by what is computed where prefixes are shared."""
    return replace(plan, ids_of=lambda index: store.row(index).ids)


def random_option(model: nn.Module, recipe: Recipe) -> str | None:
    """The option that makes a forward pass random in training; None: none does."""
    if recipe.loss.neftune_alpha:
        return "loss.neftune_alpha"
    if option := METHODS[recipe.method.name].randomness(recipe.method):
        return option
    settings = model.config.get_text_config().to_dict().items()  # type: ignore[union-attr,operator]
    inside = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if inside or any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings):
        return "the model's dropout"
    return None

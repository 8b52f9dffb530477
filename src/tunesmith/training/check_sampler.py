"""Check before the first update that sampler and learner give a token the same log-probability."""

from __future__ import annotations

import numpy as np

from tunesmith.errors import RunError, UngradedError
from tunesmith.phrases import command
from tunesmith.recipe.schema import resolved
from tunesmith.tasks.policy_losses import VALUE_COLUMNS
from tunesmith.training.setup import Setup

LARGEST = 1e-3
"""Nats by which the log-probability of a token may be off in float32; 2.5e-5 is the largest seen."""
MEAN = {"bfloat16": 0.15, "float16": 0.02}
OF_ANSWER = {"bfloat16": 0.5, "float16": 0.07}
"""Nats by which tokens may be off in the mean, and the sum of an answer, times the root of its tokens. In
bfloat16 0.05 and 0.19 are the largest seen."""
MOST_NAMED = 3


def check_sampler(setup: Setup) -> None:
    """Draw the answers of step 1 and measure them by the learner's passes: raise RunError where it finds other
    log-probabilities than those that they were drawn by. The step keeps them. Raises UngradedError where the grader
    fails for more than half of them."""
    drawing = setup.drawing
    if drawing is None:
        return
    precision, at = resolved(setup.recipe.precision), VALUE_COLUMNS.index("drawn")
    try:
        view = drawing.everything(setup, drawing.ahead(setup, 1))
    except UngradedError as error:
        recipe = setup.recipe
        words = (recipe.data.train[0].path, "--grader", recipe.reinforce.grader, "--model", recipe.model)
        raise UngradedError(f"{error} Nothing was trained. Try the grader: {command('grade', *words)}") from None
    away, means = list[tuple[float, str]](), list[float]()
    for row, logps_N in enumerate(drawing.measured(view)):
        values_NC = view.store.row(row).values_NC
        assert values_NC is not None, "it was drawn"
        off_N = np.nan_to_num(logps_N.astype(np.float64) - values_NC[:, at], nan=np.inf)
        largest, means = float(np.abs(off_N).max()), [*means, float(np.abs(off_N).mean())]
        if precision == "float32":
            is_off = largest > LARGEST
        else:
            is_off = abs(float(off_N.sum())) > OF_ANSWER[precision] * float(np.sqrt(len(off_N)))
        if is_off:
            away.append((largest, str(view.store.source(row))))
    mean = float(np.mean(means))
    if not away and (precision == "float32" or mean <= MEAN[precision]):
        return
    named = ", ".join(f"{source} by {nats:.3g} nats" for nats, source in sorted(away, reverse=True)[:MOST_NAMED])
    raise RunError(
        "step 1: before any update, tokens have other log-probabilities in the pass that learns them than in "
        f"the one that drew them, by {mean:.3g} nats in the mean{f'; {named}' if named else ''}. Every update "
        "would learn from answers of another model. Likely causes: dropout or another draw inside the model, "
        "or a model that answers otherwise with other rows in its pass. Try kernels: plain, precision: float32 "
        "or another model. Nothing was trained."
    )

"""Options of the task that learns from a teacher's probabilities."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.recipe.methods import OptionGroup, Positive

STREAMS = 64
"""Most answers that are drawn together, on policy. Another number changes rounding."""


class Distil(OptionGroup):
    """Task distil: the answers of rows, or the model's own, are learnt as a teacher would go on at each
    token, see docs/guide/distil.md."""

    teacher: str | None = None
    """The model that teaches, with the vocabulary of the model that learns: a run, a
    folder, a hub id or a .gguf file."""
    on_policy: bool = False
    """false: learn at the tokens of the rows' answers, from the teacher's likeliest tokens there, which are
    kept before training. true: at the tokens of answers that the model writes itself, from all of the teacher's
    probabilities; the teacher stays in memory."""
    top: Annotated[int, Field(ge=1, le=4096)] = 64
    """The teacher's likeliest tokens that are kept for each token of a row; the others count as one."""
    temperature: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Divides the logits of both models before they are compared, and those that answers are drawn by."""
    max_new_tokens: Positive = 256
    """Most tokens of an answer that the model writes, on policy."""

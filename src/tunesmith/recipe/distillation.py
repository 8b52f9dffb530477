"""Options of the task that learns from a teacher's probabilities."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.recipe.methods import Auto, OptionGroup, Positive

TOP, SERVED_TOP = 64, 20
"""Values of `distil.top: auto` for a teacher on this machine, and for one at an address: vLLM's own limit."""
STREAMS = 64
"""Most answers that are drawn together, on policy. Another number changes rounding."""


class Distil(OptionGroup):
    """Task distil: the answers of rows, or the model's own, are learnt as a teacher would go on at each
    token, see docs/guide/distil.md."""

    teacher: str | None = None
    """The model that teaches, with the vocabulary of the model that learns: a run, a folder, a hub id, a .gguf
    file, or the address of a server that scores prompts, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the teacher at its address."""
    key_env: str = ""
    """Name of the environment variable that has the key of the address."""
    on_policy: bool = False
    """false: learn at the tokens of the rows' answers, from the teacher's likeliest tokens there, which are
    kept before training. true: at the tokens of answers that the model writes itself, from all of the teacher's
    probabilities; the teacher stays in memory."""
    top: Annotated[int, Field(ge=1, le=4096)] | Auto = "auto"
    """The teacher's likeliest tokens that are kept for each token of a row; the others count as one. auto: 64,
    and 20 of a teacher at an address, as many as servers give that were not started for more."""
    temperature: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Divides the logits of both models before they are compared, and those that answers are drawn by."""
    max_new_tokens: Positive = 256
    """Most tokens of an answer that the model writes, on policy."""

    @property
    def is_served(self) -> bool:
        """Whether the teacher is at an address."""
        return "://" in (self.teacher or "")

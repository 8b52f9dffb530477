"""How a summary is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.errors import RecipeError
from tunesmith.types import ModelKind

PLACE = "{document}"
DEFAULT_PROMPTS: Mapping[ModelKind, str] = {
    "causal": f"Summarize the following text.\n\n{PLACE}",
    "encoder_decoder": f"summarize: {PLACE}",
}
"""What `data.prompt: null` stands for, by the kind of model."""


def summary_prompt(prompt: str | None, kind: ModelKind) -> str:
    """The prompt with a place for the document. Raises `RecipeError` for one without."""
    if prompt is not None and PLACE not in prompt:
        raise RecipeError(f"data.prompt: {prompt[:60]!r} does not say where the document stands: write {PLACE} there.")
    return DEFAULT_PROMPTS[kind] if prompt is None else prompt

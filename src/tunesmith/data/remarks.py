"""Warnings about an example that can be used, but may not be what was meant."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tunesmith.types import Example, Problem

_ALTERNATING = ("user", "assistant")


def remarks(example: Example) -> Iterator[Problem]:
    """Warnings, one a kind: two turns of one role in a row, a turn without text, an end that is not trained."""
    parts = example.parts
    last = parts[-1]
    if len(parts) == 2 and last.trained and parts[0].text and parts[0].role != last.role:
        return  # nearly every row
    for i, (before, part) in enumerate(itertools.pairwise(parts), start=1):
        if before.role == part.role and part.role in _ALTERNATING:
            yield _warning(
                example,
                "same_role_twice",
                f"messages {i} and {i + 1} are both of the {part.role}.",
                "Join them: many chat templates refuse that.",
            )
            break
    blank = next((i for i, part in enumerate(parts) if not part.text.strip() and part.role != "assistant"), None)
    if blank is not None:
        yield _warning(example, "empty_text", f"message {blank + 1} ({parts[blank].role}) has no text.", "")
    if last.role != "assistant":
        yield _warning(
            example,
            "untrained_end",
            f"it ends with a message of the {last.role}: nothing after the last answer is trained.",
            "Add the answer, or remove that message.",
        )


def _warning(example: Example, code: str, message: str, fix: str) -> Problem:
    return Problem(example.source, code, message, fix, severity="warning")

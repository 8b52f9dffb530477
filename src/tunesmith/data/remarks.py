"""Warnings about an example that can be used, but may not be what was meant."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tunesmith.data.formats import SHAPES
from tunesmith.types import Example, Problem

_ALTERNATING = ("user", "assistant")
_CHATS = SHAPES["chat"]


def remarks(example: Example) -> Iterator[Problem]:
    """Warnings, one a kind: two turns of one role in a row, a turn without text, an end that is not trained, tags."""
    if example.shape == "tokens_tags":
        yield from _odd_tags(example)
        return
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
        turn = f"message {blank + 1} ({parts[blank].role})" if example.shape in _CHATS else parts[blank].role
        yield _warning(example, "empty_text", f"{turn} has no text.", "")
    if last.role != "assistant" and not last.trained and any(part.trained for part in parts):
        yield _warning(
            example,
            "untrained_end",
            f"it ends with a message of the {last.role}: nothing after the last answer is trained.",
            "Add the answer, or remove that message.",
        )


def _odd_tags(example: Example) -> Iterator[Problem]:
    """The first tag that begins a span as if it went on with one, or names no type: see seqeval on IOB1 and IOB2."""
    before = "O"
    for i, tag in enumerate(example.labels):
        mark, _, kind = tag.partition("-")
        if tag in ("B-", "I-"):
            yield _warning(example, "odd_tag", f"word {i + 1} has the tag {tag!r}, which names no type.", "Write one.")
            return
        if mark == "I" and kind and before[2:] != kind:
            message = f"word {i + 1} has the tag {tag!r} after {before!r}: no span of {kind!r} is open."
            fix = "A span begins there all the same; in IOB2 it would be written B-."
            yield _warning(example, "odd_tag", message, fix)
            return
        before = tag


def _warning(example: Example, code: str, message: str, fix: str) -> Problem:
    return Problem(example.source, code, message, fix, severity="warning")

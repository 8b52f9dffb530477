"""What changed row by row: the held-out rows before and after, joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.scores import ANSWER_SCORES, RowResult, by_key
from tunesmith.runs.atomic import from_json
from tunesmith.runs.folder import Run

MOST_LISTED = 40
"""Rows of each list that a report names; all are counted."""
MOST_WORSE = 10

Key = tuple[str, int]
"""By which rows before and after are joined: see `by_key`."""


def rows_of(run: Run, name: str) -> dict[tuple[str, int], RowResult]:
    """The held-out rows as the evaluation `name` left them, windows of a document added up; none where it left no file.

    Raises RunError naming the line that is no row.
    """
    path = run.path / "evaluation" / f"{name}.jsonl"
    return by_key(_lines(path)) if path.exists() else {}


def answers_of(run: Run, name: str) -> list[RowResult]:
    """The answers to held-out prompts of the evaluation `name`, with their scores; none where it left no file."""
    path = run.path / "evaluation" / f"answers-{name}.jsonl"
    return list(_lines(path, ("source", "prompt", "reference", *ANSWER_SCORES))) if path.exists() else []


def _lines(path: Path, keys: Sequence[str] = ("source", "hash", "loss", "count")) -> Iterator[RowResult]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = from_json(line)
            _ = [row[key] for key in keys]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}:{number}: not a row ({error!r}): the file was changed by hand or by a fault."
            ) from error
        yield row


def flips(before: Mapping[Key, RowResult], after: Mapping[Key, RowResult]) -> dict[str, Any] | None:
    """Rows that were right and are wrong, and the other way round, surest first; None where no row is either."""
    lost: list[dict[str, Any]] = []
    gained: list[dict[str, Any]] = []
    for key in before.keys() & after.keys():
        was, now = _is_right(before[key]), _is_right(after[key])
        if was is None or now is None:
            return None
        if was != now:
            (lost if was else gained).append(_flip(before[key], after[key]))
    if not after:
        return None
    for found in (lost, gained):
        found.sort(key=lambda flip: (-flip["probability"], flip["source"]))
    return {
        "num_lost": len(lost),
        "num_gained": len(gained),
        "lost": lost[:MOST_LISTED],
        "gained": gained[:MOST_LISTED],
    }


def _is_right(row: RowResult) -> bool | None:
    return bool(target_of(row) == row["predicted"]) if "label" in row or "tags" in row else None


def target_of(row: RowResult) -> Any:
    """What the row says is right: its class or classes, tags, or number; "" where it is text."""
    return next((row[key] for key in ("label", "tags", "value") if key in row), "")


def _flip(was: RowResult, now: RowResult) -> dict[str, Any]:
    common = {"source": now["source"], "probability": _sureness(now), "text": now["text"]}
    if "tags" not in now:
        return common | {
            "label": label_text(now["label"]),
            "before": label_text(was["predicted"]),
            "after": label_text(now["predicted"]),
        }
    moved = [i for i, pair in enumerate(zip(was["predicted"], now["predicted"], strict=True)) if pair[0] != pair[1]]
    told = {"label": now["tags"], "before": was["predicted"], "after": now["predicted"]}
    return common | {key: ", ".join(f"word {i + 1} {tags[i]}" for i in moved) for key, tags in told.items()}


def _sureness(row: RowResult) -> float:
    """Of several classes the least sure one's probability."""
    chances = row.get("probability", 0.0)
    return float(min(chances, default=0.0) if isinstance(chances, list) else chances)


def label_text(label: Any) -> str:
    """A class, several of them, or a number in one text."""
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.6g}" if isinstance(label, float) else str(label)


def worse_rows(before: Mapping[Key, RowResult], after: Mapping[Key, RowResult]) -> list[dict[str, Any]]:
    """The rows whose loss per target rose most: source, text where there is one, and the loss before and after."""
    found = []
    for key in before.keys() & after.keys():
        was, now = (row["loss"] / row["count"] if row["count"] else 0.0 for row in (before[key], after[key]))
        if now > was:
            found.append({"source": after[key]["source"], "text": after[key]["text"], "before": was, "after": now})
    found.sort(key=lambda row: (row["before"] - row["after"], row["source"]))
    return found[:MOST_WORSE]

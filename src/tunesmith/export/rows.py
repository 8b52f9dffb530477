"""Rows to try an export on: what the run held out, or what comes nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from tunesmith.data.examples import examples
from tunesmith.data.folders import expand
from tunesmith.errors import DataError
from tunesmith.evaluation.forgetting import GENERAL_INSTRUCTIONS, passages
from tunesmith.export.source import Source
from tunesmith.runs.atomic import from_json
from tunesmith.runs.folder import Run
from tunesmith.types import Example, Part, TaskName
from tunesmith.types import Source as Place

MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Probes:
    """Rows, and in words which."""

    examples: list[Example]
    said: str


def find_probes(source: Source) -> Probes:
    """Up to 32 rows: held-out ones by content hash, else the first training rows, else fixed texts of the package
    where the run's data files are gone."""
    wanted = list(islice(dict.fromkeys(_held_out(source.run)), MOST_ROWS))
    try:
        found = _read(source, wanted) if wanted else []
        if found:
            return Probes(found, "held-out rows")
        first = list(islice(_examples(source, "train"), MOST_ROWS))
        if first:
            return Probes(first, "training rows, since none is held out")
    except DataError:
        pass  # the files are gone or are no rows any more: nothing of the run is needed to compare two models
    return Probes(_fixed(source), "fixed texts, since the run's data files are gone")


def _held_out(run: Run) -> Iterator[str]:
    path = run.evaluation_path / "after.jsonl"
    if path.is_file():
        with open(path, "rb") as lines:
            for line in lines:
                yield str(from_json(line)["source"])


def _read(source: Source, wanted: list[str]) -> list[Example]:
    places = {place: i for i, place in enumerate(wanted)}
    found: dict[int, Example] = {}
    for example in _examples(source, "eval" if source.recipe.data.eval else "train"):
        place = places.get(str(example.source))
        if place is not None:
            found[place] = example
            if len(found) == len(wanted):
                break
    return [found[i] for i in sorted(found)]


def _examples(source: Source, side: str) -> Iterator[Example]:
    data = source.recipe.data
    files = expand(getattr(data, side), lambda problem: None)
    for _, example in examples(files, data, lambda problem: None, task=source.renderer.task_name):
        yield example


def _fixed(source: Source) -> list[Example]:
    """Rows of the task's shape; what they would be answered with only where that is text."""
    task = source.renderer.task_name
    return [_as_row(task, text, ask, Place("general text", i + 1)) for i, (text, ask) in enumerate(_texts())]


def _texts() -> list[tuple[str, str]]:
    return list(zip(passages(), cycle(GENERAL_INSTRUCTIONS), strict=False))


def _as_row(task: TaskName, text: str, ask: str, place: Place) -> Example:
    if task == "chat":
        return Example((Part("user", ask, False), Part("assistant", text, True)), place, "messages")
    if task == "text":
        return Example((Part("text", text, True),), place, "text", plain=True)
    if task == "classify":
        return Example((Part("text", text, False),), place, "text_label")
    if task == "tag":
        return Example(tuple(Part("word", word, False) for word in text.split()), place, "tokens_tags")
    begin, end = text[: len(text) // 2], text[len(text) // 2 :]
    if task == "summarize":
        return Example(
            (Part("document", text, False), Part("summary", begin, True)), place, "document_summary", plain=True
        )
    return Example((Part("user", begin, False), Part("assistant", end, True)), place, "prompt_completion", plain=True)

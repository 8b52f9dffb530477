"""What a check remembers of the usable rows of one side, and what training would make of their labels."""

# I rows, V labels

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.check_report import Span
from tunesmith.data.labels import Seen, decide, remark_on
from tunesmith.data.split import (
    choose_share,
    crowd_note,
    has_one_input,
    held_out_mask,
    split_note,
    stratified_mask,
    stratified_note,
)
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data
from tunesmith.types import Example, LabelKind, Problem, Source, TaskName

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""Examples rendered at once: whichever bound is met first."""
MOST_LABELS = 100_000
"""Different labels remembered: numbers can be as many as rows."""


@dataclass
class SideLabels:
    """The labels of the usable rows of one side."""

    ids: dict[str, int] = field(default_factory=dict)
    """By first appearance."""
    counts: list[int] = field(default_factory=list)
    firsts: list[Source] = field(default_factory=list)
    many: bool = False
    of_rows: array[int] = field(default_factory=lambda: array("i"))
    """The first label of each text that has one or a list of them; -1: none, or one too many to be remembered."""

    def add(self, example: Example) -> None:
        if example.shape not in ("text_label", "tokens_tags"):
            return
        found = [self._id(name, example.source) for name in example.labels]
        for label in found:
            if label >= 0:
                self.counts[label] += 1
        self.many |= example.many
        if example.shape == "text_label":
            self.of_rows.append(found[0] if found else -1)

    def _id(self, name: str, source: Source) -> int:
        if name not in self.ids:
            if len(self.ids) == MOST_LABELS:
                return -1
            self.ids[name] = len(self.ids)
            self.counts.append(0)
            self.firsts.append(source)
        return self.ids[name]

    def difference(self, there: Source, row: int, other: int) -> str:
        """What to say of two rows with one text and two labels."""
        here, that = self.of_rows[row], self.of_rows[other]
        if self.many or min(here, that) < 0:
            return f"the text also stands at {there}, with another label: one of them is likely wrong."
        names = tuple(self.ids)
        labels = f"{names[that][:40]!r} there, {names[here][:40]!r} here"
        return f"the text also stands at {there}, with another label ({labels}): one of them is likely wrong."

    def seen(self) -> Seen:
        return Seen(tuple(self.ids), np.array(self.counts, np.int64), self.many, lambda label: self.firsts[label])

    def classes(self) -> NDArray[np.int64]:
        """[I], the first label of each row."""
        return np.frombuffer(self.of_rows, np.int32).astype(np.int64)


@dataclass
class SideRows:
    """What is remembered of the usable rows of one side."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    inputs: array[int] = field(default_factory=lambda: array("Q"))
    files: array[int] = field(default_factory=lambda: array("i"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    targets: array[int] = field(default_factory=lambda: array("i"))
    labels: SideLabels = field(default_factory=SideLabels)

    def held_out(self, share: float | Literal["auto"], kind: LabelKind | None) -> tuple[int, list[str]]:
        """How many of these rows training would hold out, and what is to be said of it."""
        part: float = choose_share(len(self.inputs)).value if share == "auto" else share
        inputs_I, hashes_I = (np.frombuffer(hashes, np.uint64) for hashes in (self.inputs, self.hashes))
        if not len(inputs_I):
            return 0, []
        keys_I = hashes_I if has_one_input(inputs_I) else inputs_I
        if kind == "one":
            mask_I = stratified_mask(keys_I, hashes_I, self.labels.classes(), part)
            note = stratified_note(self.labels.classes(), mask_I, part)
        else:
            mask_I, note = held_out_mask(keys_I, part), split_note(keys_I, part)
        return int(mask_I.sum()), [text for text in (note, crowd_note(keys_I, mask_I, part)) if text]


@dataclass
class Judged:
    """What training would make of the labels of a check."""

    kind: LabelKind | None = None
    counts: tuple[tuple[str, int], ...] = ()
    """Classes in the order of their ids, and how often each stands in the training rows."""
    problems: Sequence[Problem] = ()
    refusals: Sequence[str] = ()
    notes: Sequence[str] = ()


def judge(sides: Sequence[SideLabels], data: Data) -> Judged:
    """What training would make of labels: of the training rows, and of held-out files where there are any.

    Raises RecipeError where data.labels does not fit.
    """
    train = sides[0]
    if not train.ids and not train.many:
        return Judged()
    seen = [side.seen() for side in sides]
    task: TaskName = "classify" if train.of_rows else "tag"
    try:
        labels, _ = decide(task=task, data=data, class_weights="equal", trained=seen[0], sides=seen)
    except DataError as error:
        refusal = "labels that cannot be learnt" if error.problems else str(error)
        return Judged(problems=error.problems, refusals=[refusal])
    counts = seen[0].counts
    if labels.kind == "number":
        numbers = sorted(map(float, counts))
        return Judged("number", notes=[f"labels are numbers from {numbers[0]:g} to {numbers[-1]:g}"])
    names = tuple((name, counts.get(name, 0)) for name in labels.names)
    return Judged(labels.kind, names, notes=remark_on(labels.names))


def spans_of_example(example: Example) -> tuple[Span, ...]:
    """A text and its labels, or words and their tags: what is told apart stands as what is trained."""
    if example.shape == "tokens_tags":
        pairs = zip(example.parts, example.labels, strict=True)
        return tuple(span for part, tag in pairs for span in ((f"{part.text} ", False), (f"{tag} ", True)))
    text = "\n".join(part.text for part in example.parts)
    return (f"{text}\n", False), (", ".join(example.labels) or "none", True)


def chunks_of(source: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples that are looked at together. Raises as `source`, after those before."""
    chunk: list[Example] = []
    num_chars = 0
    try:
        for example in source:
            chunk.append(example)
            num_chars += sum(len(part.text) for part in example.parts)
            if len(chunk) >= CHUNK_EXAMPLES or num_chars >= CHUNK_CHARS:
                yield chunk
                chunk, num_chars = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk

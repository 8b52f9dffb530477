"""Held-out prompts answered and graded, before training and after: with the same random numbers."""

# I prompts

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import UngradedError
from tunesmith.evaluation.graded_scores import graded_result
from tunesmith.evaluation.scores import RowResult
from tunesmith.graders.prompts import reference_of
from tunesmith.phrases import plural
from tunesmith.recipe.schema import resolved
from tunesmith.training.groups import Group
from tunesmith.training.progress import Session


def graded_rows(session: Session, name: str) -> tuple[NDArray[np.int64], list[RowResult]]:
    """[I], the held-out rows with a rewarded answer, and the result of each; emits
    some answers as "sample" events.

    Raises UngradedError where no answer has a reward.
    """
    setup, drawing = session.setup, session.setup.drawing
    assert drawing is not None, "its rows are prompts"
    store, rows = setup.rows.held_store, setup.rows.held_rows.tolist()
    options = setup.recipe.reinforce
    groups = drawing.held_out(setup, store, rows)
    drawing.kept.flush()
    results = [
        (group.row, result)
        for group in groups
        if (result := graded_result(int(store.hashes[group.row]), group.records(), options.passes)) is not None
    ]
    failed = [grade for group in groups for grade in group.grades if grade.reward is None]
    if not results:
        why = f"The first: {failed[0].error[-500:]}. Try the grader: tunesmith grade"
        raise UngradedError(f"held-out answers: none of them has a reward. {why}")
    if failed:
        num = plural(sum(len(group.grades) for group in groups), "held-out answer")
        text = f"{len(failed):,} of {num} have no reward and do not count. The first: {failed[0].error[-300:]}"
        session.emit("note", {"text": text})
    evaluation = setup.recipe.evaluation
    num_shown = evaluation.samples_on_the_way if name == "step" else resolved(evaluation.samples)
    _show(session, name, groups[:num_shown])
    return np.array([row for row, _ in results], np.int64), [result for _, result in results]


def _show(session: Session, name: str, groups: list[Group]) -> None:
    """The first answer to each of these prompts, for a person to read."""
    drawing, store = session.setup.drawing, session.setup.rows.held_store
    assert drawing is not None, "its rows are prompts"
    for index, group in enumerate(groups):
        example = drawing.prompts[store][group.row]
        reference = reference_of(example.kept)
        values = {
            "prompt": example.parts[-1].text,
            "reference": "" if reference is None else reference.text,
            "answer": group.answers[0].text,
            "stopped": group.answers[0].ended,
            "source": str(example.source),
        }
        session.emit("sample", {"name": name, "index": index, **values})

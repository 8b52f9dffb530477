"""Held-out prompts answered and graded, before training and after: with the same random numbers."""

# I prompts, N tokens of an answer

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.errors import UngradedError
from tunesmith.evaluation.graded_scores import graded_result
from tunesmith.evaluation.scores import RowResult
from tunesmith.graders.prompts import reference_of
from tunesmith.phrases import plural
from tunesmith.recipe.schema import resolved
from tunesmith.training.draw import Drawing, failed_grades, first_failure
from tunesmith.training.groups import Group
from tunesmith.training.progress import Session
from tunesmith.training.setup import Setup
from tunesmith.types import JsonObject


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
        for group, nats in zip(groups, _nats_away(setup, drawing, groups), strict=True)
        if (result := graded_result(int(store.hashes[group.row]), group.records(), options.passes, nats)) is not None
    ]
    failed = failed_grades(groups)
    if not results:
        why = f"{first_failure(failed, store)}. Try the grader: tunesmith grade"
        raise UngradedError(f"held-out answers: none of them has a reward. {why}")
    if failed:
        num = plural(sum(len(group.grades) for group in groups), "held-out answer")
        text = f"{len(failed):,} of {num} have no reward and do not count. {first_failure(failed, store)}"
        session.emit("note", {"text": text})
    evaluation = setup.recipe.evaluation
    num_shown = evaluation.samples_on_the_way if name == "step" else resolved(evaluation.samples)
    for index, group in enumerate(groups[:num_shown]):
        session.emit("sample", {"name": name, "index": index, **_sample(drawing, store, group)})
    return np.array([row for row, _ in results], np.int64), [result for _, result in results]


def _nats_away(setup: Setup, drawing: Drawing, groups: list[Group]) -> list[list[float]]:
    """log π − log π_ref of each answer of each group, π_ref the untouched model: its mean over drawn answers is
    the divergence KL(π ‖ π_ref) of whole answers. Empty lists where the method keeps no untouched model."""
    if not setup.attachment.keeps_base:
        return [[] for _ in groups]
    view = drawing.everything(replace(setup, store=setup.rows.held_store), groups)
    now = drawing.measured(view)
    with setup.attachment.adapter_disabled():
        before = drawing.measured(view)
    pairs = zip(now, before, strict=True)
    nats = iter([math.fsum((now_N.astype(np.float64) - before_N).tolist()) for now_N, before_N in pairs])
    return [[next(nats) for _ in group.answers] for group in groups]


def _sample(drawing: Drawing, store: RowStore, group: Group) -> JsonObject:
    """A prompt with the first answer to it, for a person to read."""
    example = drawing.prompts[store][group.row]
    reference = reference_of(example.kept)
    return {
        "prompt": example.parts[-1].text,
        "reference": "" if reference is None else reference.text,
        "answer": group.answers[0].text,
        "stopped": group.answers[0].ended,
        "source": str(example.source),
    }

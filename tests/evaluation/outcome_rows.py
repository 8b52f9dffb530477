"""Outcomes by hand: what a model would have answered, row by row."""

from __future__ import annotations

import math

import numpy as np

from tunesmith.evaluation.outcomes import Outcomes


def outcomes_of(outputs, targets, *, losses=None, counts=None, num_bytes=None) -> Outcomes:
    num = len(targets)
    return Outcomes(
        losses_I=np.array(losses if losses is not None else [1.0] * num, np.float64),
        counts_I=np.array(counts if counts is not None else [1.0] * num, np.float64),
        num_bytes_I=np.array(num_bytes if num_bytes is not None else [0] * num, np.int64),
        outputs=[np.asarray(output) for output in outputs],
        targets=[np.asarray(target) for target in targets],
    )


def tokens(outputs, targets, **sums) -> Outcomes:
    return outcomes_of(
        [np.array(row, np.int64) for row in outputs], [np.array(row, np.int64) for row in targets], **sums
    )


def classes(chances, true) -> Outcomes:
    """Rows with one class each, from the probabilities of the classes."""
    logits = [[[math.log(max(p, 1e-30)) for p in row]] for row in chances]
    return outcomes_of(np.array(logits, np.float32), [np.array([t], np.int64) for t in true])


def sets(chances, true) -> Outcomes:
    """Rows with any number of classes, from each class's own probability."""
    logits = [[[math.log(p / (1 - p)) for p in row]] for row in chances]
    return outcomes_of(np.array(logits, np.float32), [np.array([row], np.float32) for row in true])


def numbers(predicted, true) -> Outcomes:
    return outcomes_of([np.array([[p]], np.float32) for p in predicted], [np.array([t], np.float32) for t in true])


def drawn(outcomes: Outcomes, rows) -> Outcomes:
    """The outcomes of these rows, in this order, as often as they are named."""
    return Outcomes(
        losses_I=outcomes.losses_I[rows],
        counts_I=outcomes.counts_I[rows],
        num_bytes_I=outcomes.num_bytes_I[rows],
        outputs=[outcomes.outputs[i] for i in rows],
        targets=[outcomes.targets[i] for i in rows],
    )

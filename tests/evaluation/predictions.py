"""Predictions by hand: the outputs and targets of a model, row by row, and the results that follow from them."""

import math

import numpy as np

from tunesmith.evaluation.predict_rows import Predictions, row_results


def predictions_of(outputs, targets, *, losses=None, counts=None, num_bytes=None) -> Predictions:
    num = len(targets)
    return Predictions(
        losses_I=np.array(losses if losses is not None else [1.0] * num, np.float64),
        counts_I=np.array(counts if counts is not None else [1.0] * num, np.float64),
        num_bytes_I=np.array(num_bytes if num_bytes is not None else [0] * num, np.int64),
        outputs=[np.asarray(output) for output in outputs],
        targets=[np.asarray(target) for target in targets],
    )


def tokens(outputs, targets, *, counts=None, **sums) -> Predictions:
    counts = counts if counts is not None else [len(row) for row in targets]
    rows = ([np.array(row, np.int64) for row in side] for side in (outputs, targets))
    return predictions_of(*rows, counts=counts, **sums)


def classes(chances, true) -> Predictions:
    """Rows with one class each, from the probabilities of the classes."""
    logits = [[[math.log(max(p, 1e-30)) for p in row]] for row in chances]
    return predictions_of(np.array(logits, np.float32), [np.array([t], np.int64) for t in true])


def sets(chances, true) -> Predictions:
    """Rows with any number of classes, from each class's own probability."""
    logits = [[[math.log(p / (1 - p)) for p in row]] for row in chances]
    return predictions_of(np.array(logits, np.float32), [np.array([row], np.float32) for row in true])


def numbers(predicted, true) -> Predictions:
    return predictions_of([np.array([[p]], np.float32) for p in predicted], [np.array([t], np.float32) for t in true])


def results(head, labels, found: Predictions, hashes=None):
    """The rows' results; without hashes every row is another one, in this order."""
    return row_results(head, labels, found, np.arange(len(found), dtype=np.uint64) if hashes is None else hashes)

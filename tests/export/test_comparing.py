"""What chance does to few rows is no fault of an export; what every row shows is."""

import numpy as np
import pytest

from tunesmith.export.target import ROUNDED
from tunesmith.export.verify import ExportComparison, Outputs, compare

COUNTS = [3, 5, 2, 6]


def compared(moved: list[float]) -> ExportComparison:
    """Two models that answer alike but for the losses of rows, which the second moves by so much a target."""
    logits = [np.zeros((1, 4), np.float32)] * len(moved)
    ids, counts = [[1, 2]] * len(moved), COUNTS[: len(moved)]
    losses = [2.0 * count for count in counts]
    others = [(2.0 + by) * count for by, count in zip(moved, counts, strict=True)]
    tuned = Outputs(ids, losses=losses, counts=counts, logits=logits)
    return compare(tuned, Outputs(ids, losses=others, counts=counts, logits=logits), base=None, labels=None)


def test_few_rows_that_move_up_and_down_are_no_fault() -> None:
    found = compared([0.2, -0.1, 0.1, -0.03])
    moved = found.loss_exported - found.loss_tuned  # type: ignore[operator]
    assert moved == pytest.approx((0.2 * 3 - 0.1 * 5 + 0.1 * 2 - 0.03 * 6) / 16)
    assert found.loss_error == pytest.approx(0.06, abs=0.01)
    assert found.problems(ROUNDED) == []


def test_rows_that_all_move_alike_are_a_fault_however_few() -> None:
    for num in (1, 2, 4):
        found = compared([0.03] * num)
        assert (found.loss_error is None) == (num == 1)  # of one row nobody knows what is chance
        [problem] = found.problems(ROUNDED)
        assert problem.startswith("its loss is +0.0300 from the tuned model's, at most 0.02 allowed")


def test_the_error_is_that_of_means_where_rows_are_of_one_length() -> None:
    moved = np.random.default_rng(0).normal(0.0, 0.1, 200)
    counts = [4] * 200
    tuned = Outputs([[1]] * 200, losses=[8.0] * 200, counts=counts)
    other = Outputs([[1]] * 200, losses=list(8.0 + 4 * moved), counts=counts)
    found = compare(tuned, other, base=None, labels=None)
    assert found.loss_error == pytest.approx(moved.std(ddof=1) / 200**0.5, rel=1e-9)

"""Which training rows are looked through for surprising ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tunesmith.evaluation.row_lines import looked_through


@pytest.mark.parametrize("most", [0, 1, 7, 40, 60, 100])
def test_rows_of_the_smallest_hashes_are_looked_through_as_if_all_had_been_sorted(most: int):
    generator = np.random.default_rng(0)
    store = SimpleNamespace(hashes=generator.integers(2**62, size=80).astype(np.uint64) // np.uint64(2**57))
    rows_I = generator.permutation(80)[:60]
    assert len(np.unique(store.hashes)) < 40, "some are equal, so that the order of rows has a say"
    expected = rows_I[np.argsort(store.hashes[rows_I], kind="stable")][:most]
    assert looked_through(store, rows_I, most).tolist() == expected.tolist()

"""`python -m benchmarks.padding`, and what docs/performance.md promises of padding."""

from __future__ import annotations

import pytest
from benchmarks.padding import LINES, PAIRS, Drawn, plan_of, planning_seconds, table


def padding(drawn: Drawn, rows_per_step: int, *, steps: int = 128, grouped: bool = True) -> float:
    made = plan_of(drawn, rows_per_step=rows_per_step, steps=steps, grouped=grouped)
    return made.padding(most_steps=steps)


@pytest.mark.parametrize("rows_per_step", [8, 16, 64])
@pytest.mark.parametrize("drawn", LINES, ids=lambda drawn: drawn.name)
def test_at_most_two_percent_are_padding(drawn, rows_per_step):
    assert padding(drawn, rows_per_step) <= 0.02
    assert padding(drawn, rows_per_step, grouped=False) > 0.02


@pytest.mark.parametrize(("drawn", "most"), list(zip(PAIRS, (0.02, 0.02, 0.045), strict=True)), ids=str)
def test_of_an_encoder_decoder_two_percent_but_for_short_targets_that_follow_loosely(drawn, most):
    assert padding(drawn, 8, steps=512) <= most < padding(drawn, 8, steps=512, grouped=False)


def test_a_table_has_a_cell_for_every_kind_of_rows():
    lines = list(table(LINES, ((8, 16),), "rows a step"))
    assert len(lines) == 3
    assert all(line.count("|") == 2 + len(LINES) for line in lines)
    assert lines[-1].startswith("| 8 | 33.4 % in 1.5 → ")
    assert lines[-1].count("→") == len(LINES)
    assert all(seconds > 0 for seconds in planning_seconds(10_000))

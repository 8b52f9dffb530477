"""ASHA's decisions, against the rule of the paper computed from scratch."""

import math
import random

import pytest

from tunesmith.sweeps.grid import Asha, Judge


@pytest.mark.parametrize(("factor", "first"), [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_rungs_are_ever_further_apart(factor: int, first: int) -> None:
    judge = Judge(Asha(factor, first), every=10, lower_is_better=True)
    rungs = [step for step in range(1, 10 * first * factor**3 + 1) if judge.is_rung(step)]
    assert rungs == [10 * first * factor**k for k in range(4)]


@pytest.mark.parametrize("lower", [True, False])
def test_a_trial_goes_on_only_among_the_best_of_those_that_came(lower: bool) -> None:
    draw = random.Random(3)
    for _ in range(50):
        judge, seen = Judge(Asha(3), 5, lower), []
        for i in range(20):
            value = draw.choice([draw.random(), math.nan])
            verdict = judge.hear(f"t{i}", 5, value)
            seen.append(value)
            worth = sorted(v if lower else -v for v in seen if math.isfinite(v))
            best = worth[: max(1, len(seen) // 3)]
            goes_on = math.isfinite(value) and (value if lower else -value) in best
            assert (verdict is None) == goes_on
            assert goes_on or (verdict["step"], verdict["of"]) == (5, len(seen))


def test_an_evaluation_heard_again_counts_once() -> None:
    judge = Judge(Asha(2), 5, lower_is_better=True)
    assert judge.hear("a", 5, 1.0) is None
    assert judge.hear("a", 5, 1.0) is None
    assert judge.hear("b", 5, 2.0) == {"step": 5, "value": 2.0, "rank": 2, "of": 2}
    assert judge.hear("b", 7, 2.0) is None

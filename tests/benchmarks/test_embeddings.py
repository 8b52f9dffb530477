"""The page of `python -m benchmarks embeddings`: what counts as the same losses, and as better."""

from typing import Any

import pytest
from benchmarks.embeddings import _page


def page(*, loss: float = 0.5, low: float = 0.01) -> dict[str, Any]:
    steps = [
        {"values": {"loss": 0.5, "passes": 6, "rows": [1, 2]}, "timing": {"seconds": seconds}}
        for seconds in (9.0, 9.0, 2.0, 2.0)
    ]
    peer = {"losses": [0.5, 0.5, loss], "seconds": [9.0, 9.0, 4.0], "versions": {}}
    change = {"value": 0.05, "low": low, "high": 0.1}
    measures = {key: {"value": 0.5} for key in ("recall_1", "ndcg_10")}
    report = {
        "metrics": {"before": {"measures": measures}, "after": {"measures": measures}},
        "changes": {"recall_1": change},
        "baseline": {"measures": {"recall_1": {"value": 0.4, "change": change}}},
    }
    return _page(steps, peer, report)


def test_seconds_are_compared_behind_the_first_steps():
    assert any("ratio 0.50" in line for line in page()["lines"])


@pytest.mark.parametrize(
    ("how", "failed"), [({}, []), ({"loss": 0.5002}, ["losses"]), ({"low": -0.01}, ["before", "BM25"])]
)
def test_other_losses_or_no_clear_gain_fail(how, failed):
    assert [name for name, holds in page(**how).items() if holds is False] == failed

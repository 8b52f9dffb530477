"""`python -m benchmarks.pieces`: the ways of a piece compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import pieces

F64 = torch.float64
SMALL = {
    "rotation": lambda: pieces.rotation(F64, 5),
    "softmax": lambda: pieces.softmax(F64, 7),
    "silu": lambda: pieces.silu(F64, 3),
    "norm": lambda: pieces.norm(torch.float32, 4),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_ways_agree(make: Callable[[], pieces.Ways]) -> None:
    first, *others = ([*found] if isinstance(found := way(), tuple) else [found] for way in make().values())
    assert others
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_command_tells_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    pieces.main(["--turns", "1", "--threads", "1"])
    torch.set_num_threads(before)
    told = capsys.readouterr().out
    assert all(f"| {piece} | as it is |" in told for piece in pieces.PIECES)
